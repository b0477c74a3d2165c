"""A supra model for transformers: a transformer whose mixers may be linear attention.

``supra`` writes this file into a model's folder, where ``trust_remote_code=True`` runs it; it
needs nothing but torch and transformers::

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

For one head with decay gamma, phi the feature map::

    S_t = gamma S_{t-1} + phi(k_t)^T v_t          o_t = phi(q_t) S_t

Many tokens are computed in chunks, one token by the recurrence. A layer with a window gives the
last W tokens softmax weights and keeps the older ones in S. Products are taken in the weights'
type; states, sums and softmax are float32.

Letters in shapes: B batch, T new tokens, S slots (cached and new), H query heads, K key/value
heads, G = H / K, d channels a head, Dk features a head, Dv value channels a head, W window.

Apache-2.0; to change it, change supra's ``backends/supra_torch/hf/``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_supra import (
    Experts,
    LinearAttention,
    Mixer,
    Rope,
    SoftmaxAttention,
    SupraConfig,
)

# With heads of 64 channels the weights inside a chunk then cost what its state costs.
CHUNK = 64
# Tokens worked on at once, so that their states and windows do not fill the memory.
SEGMENT = 2048
# Small, and their rounding is not: float32 whatever the weights' type.
FLOAT32_PARAMETERS = ("log_slope", "log_far_gain", "log_sink")
# A logarithm of nothing; finite, since a row of minus infinities would be NaN.
NEVER = -1e30

Memory = dict[str, Tensor]


def is_linear(mixer: Mixer) -> TypeGuard[LinearAttention]:
    """By name: transformers may load the configuration's file twice, which makes two classes."""
    return mixer.layer_type == "linear_attention"


def is_softmax(mixer: Mixer) -> TypeGuard[SoftmaxAttention]:
    """The other kind."""
    return not is_linear(mixer)


# --- what a sequence remembers --------------------------------------------------------------


class SupraCache(Cache):
    """The states of a batch of sequences, for ``past_key_values``.

    ``memory``: each layer's named tensors, batch first. Linear layers' are of one size whatever
    the number of tokens, softmax layers' without a window grow with it. ``seen``: columns of
    ``input_ids`` so far, padding included; ``tokens`` (B,): those that were no padding.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.memory: list[Memory] = [{} for _ in range(layers)]
        self.seen = 0
        self.tokens: Tensor | None = None

    def __len__(self) -> int:
        return len(self.memory)

    def __repr__(self) -> str:
        return f"SupraCache(layers={len(self.memory)}, seen={self.seen})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, as transformers counts them."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Columns seen, as transformers counts them."""
        return self.seen

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Columns after ``query_length`` more, and the offset of the first."""
        return self.seen + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: there is no longest sequence."""
        return -1

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first."""
        return -1 if self.tokens is None else len(self.tokens)

    @property
    def is_initialized(self) -> bool:
        return self.tokens is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """As before the first token."""
        self.memory = [{} for _ in self.memory]
        self.seen, self.tokens = 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Each row becomes a copy of the row that ``beam_idx`` (B,) names."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows that ``indices`` name."""
        self._each_row(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes ``repeats`` rows."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory = [{name: change(x) for name, x in layer.items()} for layer in self.memory]
        self.tokens = None if self.tokens is None else change(self.tokens)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise ValueError(
            "a recurrent state cannot forget its last tokens or take keys and values from outside: "
            "use greedy search, sampling or beam search, and copy.deepcopy(past_key_values) where "
            "several continuations begin at one prompt"
        )

    crop = update = update_conv_state = update_recurrent_state = _refuse
    activate_past_recording = early_initialization = _refuse


# --- linear attention -----------------------------------------------------------------------


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay, in chunks.

    q (B, T, H, Dk); k (B, T, K, Dk); v (B, T, K, Dv); slope (H,) float32, -ln gamma; state
    (B, H, Dk, Dv) float32, None for zeros; mask (B or 1, T) bool: a False token neither writes
    nor decays. Returns the output (B, T, H, Dv) and the final state, both float32.
    """
    B, T, H, Dk = q.shape
    if state is None:
        state = q.new_zeros(B, H, Dk, v.shape[-1], dtype=torch.float32)
    if q.dtype == torch.float16:
        # Sums of many features leave its range.
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        if T == 1:
            return _one_token(q, k, v, slope, state, mask)
        outputs, start = [], 0
        while start < T:
            rest = T - start
            size = min(CHUNK, rest)
            tokens = min(SEGMENT, rest // size * size)
            rows = slice(start, start + tokens)
            valid = None if mask is None else mask[:, rows]
            output, state = _chunks(q[:, rows], k[:, rows], v[:, rows], slope, state, valid, size)
            outputs.append(output)
            start += tokens
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence, for T = 1."""
    B, _, H, Dk = q.shape
    K = k.shape[2]
    written = (k.float()[:, 0, :, :, None] * v.float()[:, 0, :, None]).unsqueeze(2)
    grouped = state.unflatten(1, (K, H // K))
    after = (grouped * torch.exp(-slope).view(K, -1, 1, 1) + written).flatten(1, 2)
    if mask is not None:
        after = torch.where(mask[:, 0, None, None, None], after, state)
    output = (q.float()[:, 0, :, None] @ after).squeeze(2)
    return output[:, None], after


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    size: int,
) -> tuple[Tensor, Tensor]:
    """n chunks of C = ``size`` tokens at once; with a_i the valid tokens of a chunk up to i::

        o_i = sum_{j <= i} gamma^(a_i - a_j) (q_i . k_j) v_j + gamma^(a_i) q_i S
        S'  = gamma^L S + sum_j gamma^(L - a_j) k_j^T v_j,  L = a_C

    Every exponent of gamma is >= 0, so nothing overflows.
    """
    B, T, H, _ = q.shape
    K, C, n = k.shape[2], size, T // size
    q = q.view(B, n, C, K, H // K, -1).permute(0, 1, 3, 4, 2, 5)  # (B, n, K, G, C, Dk)
    k, v = (x.unflatten(1, (n, C)).transpose(2, 3) for x in (k, v))  # (B, n, K, C, ·)
    valid = mask if mask is not None else torch.ones(1, C, dtype=torch.bool, device=q.device)
    valid = valid.unflatten(1, (-1, C))[:, :, None, None]  # (B or 1, n or 1, 1, 1, C)
    age = valid.cumsum(-1).float()
    rate = slope.float().view(K, -1, 1)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    exponent = (age[..., :, None] - age[..., None, :]).clamp(min=0)
    inside = torch.exp(-rate[..., None] * exponent) * (causal & valid[..., None, :])
    left = torch.exp(-rate * (age[..., -1:] - age)) * valid
    whole = torch.exp(-rate * age[..., -1:])[..., None]  # (B or 1, n or 1, K, G, 1, 1)

    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, (-1, C)) * inside.to(q.dtype)
    output = (scores.flatten(3, 4) @ v).unflatten(3, (-1, C)).float()

    decayed = k[:, :, :, None] * left[..., None].to(k.dtype)
    written = (decayed.mT @ v[:, :, :, None]).float()  # (B, n, K, G, Dk, Dv)
    state, before = state.unflatten(1, (K, -1)), []
    for chunk in range(n):
        before.append(state)
        state = whole[:, min(chunk, whole.shape[1] - 1)] * state + written[:, chunk]
    read = (q @ torch.stack(before, dim=1).to(q.dtype)).float()
    output = output + read * torch.exp(-rate * age)[..., None]
    return output.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2), state.flatten(1, 2)


def with_ones(v: Tensor) -> Tensor:
    """v (..., Dv) with a column of ones, which sums the weights: (..., Dv + 1)."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def divided(output: Tensor, sums: Tensor) -> Tensor:
    """output / sums, 0 where nothing was written and the sum is 0."""
    empty = sums == 0
    return torch.where(empty, 0.0, output / torch.where(empty, 1.0, sums))


def window_softmax(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, far: Tensor, far_mass: Tensor, window: int
) -> Tensor:
    """Softmax over the last W tokens and one more slot for all that came before them.

    q (B, T, H, d); k and v (B, W + T, K, ·) and valid (B or 1, W + T) begin W tokens before the
    first query; far (B, T, H, Dv) float32 is the average of the older tokens and far_mass
    (B, T, H) float32 the logarithm of their weight. Returns (B, T, H, Dv) float32.

    Blocks of C queries see C + W slots: the T x T matrix is never made.
    """
    B, T, H, d = q.shape
    K, C = k.shape[2], min(CHUNK, T)
    n = math.ceil(T / C)
    filling = n * C - T
    if filling:
        q, k, v, far = (F.pad(x, (0, 0, 0, 0, 0, filling)) for x in (q, k, v, far))
        far_mass, valid = F.pad(far_mass, (0, 0, 0, filling)), F.pad(valid, (0, filling))
    slots = C + window
    # (B, n, K, G C, d) times (B, n, K, d, C + W)
    rows = q.view(B, n, C, K, H // K, d).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    scores = (rows @ k.unfold(1, slots, C)).float() / math.sqrt(d)
    query, slot = (torch.arange(size, device=q.device) for size in (C, slots))
    band = (slot > query[:, None]) & (slot <= query[:, None] + window)
    seen = band & valid.unfold(1, slots, C)[:, :, None, None, None]
    scores = scores.unflatten(3, (-1, C)).masked_fill(~seen, float("-inf"))

    def by_head(x: Tensor) -> Tensor:
        """(B, n C, H, D) -> (B, n, K, G, C, D)."""
        return x.view(B, n, C, K, H // K, -1).permute(0, 1, 3, 4, 2, 5)

    scores = torch.cat([scores, by_head(far_mass)], dim=-1)
    weights = scores.softmax(-1)
    near = weights[..., :-1].to(v.dtype).flatten(3, 4) @ v.unfold(1, slots, C).mT
    output = near.float().unflatten(3, (-1, C)) + weights[..., -1:] * by_head(far)
    return output.permute(0, 1, 4, 2, 3, 5).reshape(B, n * C, H, -1)[:, :T]


# --- parts of a layer -----------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a gain only; the gain is the weight plus ``weight_offset``."""

    def __init__(self, size: int, config: SupraConfig) -> None:
        super().__init__()
        fields = config.norm_fields()
        self.kind, self.eps, self.offset = (fields[n] for n in ("kind", "eps", "weight_offset"))
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size), computed in float32 and returned in its own type."""
        gain = self.weight.float() + self.offset
        if self.kind == "layer_norm":
            return F.layer_norm(x.float(), gain.shape, gain, None, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), gain.shape, gain, self.eps).to(x.dtype)


class FeatureProjection(nn.Module):
    """The learned part of a feature map, over all heads together or for each head."""

    def __init__(self, mixer: LinearAttention, heads: int, channels: int) -> None:
        super().__init__()
        self.heads, self.per_head = heads, mixer.projection == "per_head"
        if self.per_head:
            self.weight = nn.Parameter(torch.empty(heads, mixer.size, channels))
            bias = torch.empty(heads, mixer.size)
        else:
            self.weight = nn.Parameter(torch.empty(heads * mixer.size, heads * channels))
            bias = torch.empty(heads * mixer.size)
        self.bias = nn.Parameter(bias) if mixer.bias else None

    def forward(self, z: Tensor) -> Tensor:
        """z (B, T, heads, d) -> (B, T, heads, size)."""
        if not self.per_head:
            return F.linear(z.flatten(-2), self.weight, self.bias).unflatten(-1, (self.heads, -1))
        z = torch.einsum("bthd,hfd->bthf", z, self.weight)
        return z if self.bias is None else z + self.bias.to(z.dtype)


class FeedForward(nn.Module):
    """A gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: SupraConfig, inner: int, bias: bool = False) -> None:
        super().__init__()
        D = config.hidden_size
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)
        self.silu = config.hidden_act == "silu"

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        gate = self.gate_proj(x)
        gate = F.silu(gate) if self.silu else F.gelu(gate, approximate="tanh")
        return self.down_proj(gate * self.up_proj(x))


class MixtureOfExperts(nn.Module):
    """A token's most probable experts, weighted by their probabilities (arXiv 2401.04088)."""

    def __init__(self, config: SupraConfig, experts: Experts) -> None:
        super().__init__()
        self.per_token, self.normalise = experts.per_token, experts.normalise
        self.gate = nn.Linear(config.hidden_size, experts.count, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(config, experts.intermediate_size) for _ in range(experts.count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D); sums are float32, experts without a token are left out."""
        flat = x.flatten(0, -2)
        weights, chosen = self.gate(flat).softmax(-1, dtype=torch.float32).topk(self.per_token)
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        loads = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        out = torch.zeros_like(flat, dtype=torch.float32)
        for expert, places in zip(self.experts, order.split(loads), strict=True):
            if len(places):
                tokens = places // self.per_token
                y = expert(flat[tokens]) * weights.flatten()[places, None]
                out.index_add_(0, tokens, y.float())
        return out.to(x.dtype).view_as(x)


def activate(activation: str, z: Tensor) -> Tensor:
    """A feature map's activation over the last axis; signed ones double it."""
    if activation == "relu":
        return torch.relu(z)
    if activation == "signed_relu":
        return torch.cat([torch.relu(z), torch.relu(-z)], dim=-1)
    if activation == "signed_softmax":
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)
    return z


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first channels of x (B, T, heads, ·) rotated in float32, returned in its own type.

    cos and sin (B or 1, T, 1, R / 2); channel i pairs with i + R / 2, or 2 i with 2 i + 1.
    """
    width = 2 * cos.shape[-1]
    z = x[..., :width].float()
    first, second = z.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else z.chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    out = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([out.to(x.dtype), x[..., width:]], dim=-1)


def softcapped(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def rotation_name(config: SupraConfig, mixer: Mixer) -> str | None:
    """Under which name a layer finds the angles it rotates by, None for none."""
    width = config.rotated_width(mixer)
    return None if width is None else f"{mixer.rotary}.{width}"


# --- mixers ---------------------------------------------------------------------------------

Rotations = dict[str, tuple[Tensor, Tensor]]


class Attention(nn.Module):
    """The projections that every mixer has, and what a family puts behind them."""

    def __init__(self, config: SupraConfig, mixer: Mixer) -> None:
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        size, bias = config.head_dim, config.attention_bias != "none"
        query_bias = bias
        folded = is_linear(mixer) and mixer.projection == "folded"
        if is_linear(mixer) and folded:
            size, query_bias = mixer.size, mixer.bias
        self.heads, self.key_value_heads = H, K
        self.q_proj = nn.Linear(D, H * size, bias=query_bias)
        self.k_proj = nn.Linear(D, K * size, bias=query_bias)
        self.v_proj = nn.Linear(D, K * config.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(H * config.value_head_dim, D, bias=config.attention_bias == "qkvo")
        self.query_scale = 1.0
        if config.attention_scale is not None and not folded:
            self.query_scale = config.attention_scale * config.head_dim**0.5
        self.norm_scope = config.query_key_norm
        if self.norm_scope != "none":
            d, per_head = config.head_dim, self.norm_scope == "per_head"
            self.q_proj_norm = Norm(d if per_head else H * d, config)
            self.k_proj_norm = Norm(d if per_head else K * d, config)
        self.rotation = rotation_name(config, mixer)
        self.interleaved = False
        if self.rotation is not None:
            self.interleaved = config.ropes()[mixer.rotary].pairing == "interleaved"

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, d), k (B, T, K, d), normed and scaled, v (B, T, K, Dv)."""
        q, k = self.q_proj(x), self.k_proj(x)
        if self.norm_scope == "all_heads":
            q, k = self.q_proj_norm(q), self.k_proj_norm(k)
        q, k = q.unflatten(-1, (self.heads, -1)), k.unflatten(-1, (self.key_value_heads, -1))
        if self.norm_scope == "per_head":
            q, k = self.q_proj_norm(q), self.k_proj_norm(k)
        v = self.v_proj(x).unflatten(-1, (self.key_value_heads, -1))
        return (q if self.query_scale == 1.0 else q * self.query_scale), k, v

    def rotated(self, q: Tensor, k: Tensor, rotations: Rotations) -> tuple[Tensor, Tensor]:
        """q and k by their positions' angles; as they are where the mixer has no rope."""
        if self.rotation is None:
            return q, k
        cos, sin = rotations[self.rotation]
        return rotate(q, cos, sin, self.interleaved), rotate(k, cos, sin, self.interleaved)


class SoftmaxMixer(Attention):
    """Softmax attention; remembers keys and values, of a sliding window the last W."""

    def __init__(self, config: SupraConfig, mixer: SoftmaxAttention) -> None:
        super().__init__(config, mixer)
        self.window, self.softcap = mixer.window, config.attention_softcap

    def forward(
        self, x: Tensor, rotations: Rotations, mask: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """x (B, T, D) -> (B, T, D) and the new memory; mask (B, T) bool, False for padding."""
        q, k, v = self.projected(x)
        q, k = self.rotated(q, k, rotations)
        T, valid = x.shape[1], mask
        if memory:
            old, k = memory["keys"].shape[1], torch.cat([memory["keys"], k], dim=1)
            v = torch.cat([memory["values"], v], dim=1)
            if mask is not None or "valid" in memory:
                every = x.new_ones(x.shape[:2], dtype=torch.bool)
                before = memory.get("valid", every[:, :1].expand(-1, old))
                valid = torch.cat([before, every if mask is None else mask], dim=1)
        out = self._attend(q, k, v, self._seen(T, k.shape[1], valid, x.device))
        return self.o_proj(out.flatten(-2)), self._remembered(k, v, valid)

    def _seen(self, T: int, S: int, valid: Tensor | None, device: Any) -> Tensor | None:
        """Which of S slots each of the last T tokens sees, (B or 1, 1, T, S); None for all."""
        if valid is None and (self.window is None or self.window >= S) and T in (1, S):
            return None
        slot = torch.arange(S, device=device)
        mine = slot[S - T :, None]
        if valid is None:
            valid = torch.ones(1, S, dtype=torch.bool, device=device)
        seen = (slot <= mine) & valid[:, None]
        if self.window is not None:
            # Distances are counted in tokens, not in padding.
            age = valid.long().cumsum(1)
            seen = seen & (age[:, S - T :, None] - age[:, None] < self.window)
        # Padding sees itself: an empty row would be NaN.
        return (seen | (slot == mine))[:, None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """q (B, T, H, d), k and v (B, S, K, ·) -> (B, T, H, Dv)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        causal, group = seen is None and q.shape[2] > 1, q.shape[1] // k.shape[1]
        if self.softcap is None and seen is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=group > 1)
            return out.transpose(1, 2)
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
        scores = softcapped((q @ k.mT).float() / math.sqrt(q.shape[-1]), self.softcap)
        if causal:
            seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)

    def _remembered(self, k: Tensor, v: Tensor, valid: Tensor | None) -> Memory:
        new = {"keys": k, "values": v}
        if valid is not None:
            new["valid"] = valid
        if self.window is None or k.shape[1] <= self.window:
            return new
        if valid is not None:
            # The last W slots are to be the last W tokens.
            order = torch.argsort(valid.int(), dim=1, stable=True)
            new = {name: gathered(z, order) for name, z in new.items()}
        # Copied, so that the memory of what lies before them is given back.
        return {name: z[:, -self.window :].clone() for name, z in new.items()}


class LinearMixer(Attention):
    """Linear attention with a feature map; what it remembers is of one size.

    ``state`` (B, H, Dk, Dv), or (B, H, Dk, Dv + 1) with the sum of the weights; with a window
    also the last W ``keys``, ``values`` and ``features``, right-aligned, and which are ``valid``.
    """

    def __init__(self, config: SupraConfig, mixer: LinearAttention) -> None:
        super().__init__(config, mixer)
        self.mixer = mixer
        H, K, Dv = self.heads, self.key_value_heads, config.value_head_dim
        if mixer.projection in ("all_heads", "per_head"):
            self.q_feature = FeatureProjection(mixer, H, config.head_dim)
            if not mixer.shared:
                self.k_feature = FeatureProjection(mixer, K, config.head_dim)
        if mixer.qk_norm:
            self.q_norm = Norm(H * mixer.features, config)
            self.k_norm = Norm(H * mixer.features, config)
        if mixer.slopes is None:
            self.log_slope = nn.Parameter(torch.empty(H))
        if mixer.gain != "none":
            self.gain = nn.Parameter(torch.empty((H,) if mixer.gain == "per_head" else (H, Dv)))
        if mixer.window is not None:
            self.log_far_gain = nn.Parameter(torch.empty(H))
        if mixer.sink:
            self.log_sink = nn.Parameter(torch.empty(H))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearMixer:
        """Casts of the whole module leave the float32 parameters' type."""
        before = {
            n: p.data for n, p in self.named_parameters(recurse=False) if n in FLOAT32_PARAMETERS
        }
        super()._apply(fn, recurse)
        for name, data in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != torch.float32 and parameter.dtype.is_floating_point:
                parameter.data = data.float().to(parameter.device)
        return self

    def forward(
        self, x: Tensor, rotations: Rotations, mask: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """x (B, T, D) -> (B, T, D) and the new memory; mask (B, T) bool, False for padding."""
        mixer = self.mixer
        q, k, v = self.projected(x)
        if mixer.rope == "before":
            q, k = self.rotated(q, k, rotations)
        if mixer.projection in ("all_heads", "per_head"):
            q, k = self.q_feature(q), (self.q_feature if mixer.shared else self.k_feature)(k)
        if mixer.rope == "between":
            q, k = self.rotated(q, k, rotations)
        # Under autocast a softmax is float32.
        phi_q, phi_k = (activate(mixer.activation, z).to(v.dtype) for z in (q, k))
        if mixer.qk_norm:
            phi_k, v = (z.repeat_interleave(self.heads // z.shape[2], 2) for z in (phi_k, v))
            phi_q = self.q_norm(phi_q.flatten(-2)).view(phi_q.shape)
            phi_k = self.k_norm(phi_k.flatten(-2)).view(phi_k.shape)
        if mixer.rope == "after":
            phi_q, phi_k = self.rotated(phi_q, phi_k, rotations)
        phi_k = phi_k if mixer.key_scale == 1.0 else phi_k * mixer.key_scale
        if mixer.window is not None:
            out, memory = self._windowed(q, k, v, phi_q, phi_k, mask, memory)
        else:
            by_sum = mixer.group_eps is None
            values = with_ones(v) if by_sum else v
            out, state = linear_attention(
                phi_q, phi_k, values, self._slope(v), memory.get("state"), mask
            )
            memory = {"state": state}
            out = divided(out[..., :-1], self._with_sink(out[..., -1:])) if by_sum else out
        if mixer.group_eps is not None:
            out = F.layer_norm(out, out.shape[-1:], eps=mixer.group_eps)
        out = out.to(v.dtype)
        if mixer.gain != "none":
            out = (out * self.gain.view(self.heads, -1)).to(v.dtype)
        return self.o_proj(out.flatten(-2)), memory

    def _slope(self, like: Tensor) -> Tensor:
        """-ln gamma of each head, (H,) float32."""
        if self.mixer.slopes is None:
            return self.log_slope.float().exp()
        return torch.tensor(self.mixer.slopes, dtype=torch.float32, device=like.device)

    def _with_sink(self, sums: Tensor) -> Tensor:
        """The sums (B, T, H, 1) with the weight of attending to nothing, where there is one."""
        return sums + self.log_sink.float().exp()[:, None] if self.mixer.sink else sums

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi_q: Tensor,
        phi_k: Tensor,
        mask: Tensor | None,
        memory: Memory,
    ) -> tuple[Tensor, Memory]:
        """Softmax weights inside the window, linear weights before it, one sum for both::

            w_tj = exp(q_t . k_j / sqrt(size))                          t - W < j <= t
            w_tj = far_gain gamma^(t - W - j) (phi(q_t) . phi(k_j))     j <= t - W
            o_t  = sum_j w_tj v_j / (sink_t + sum_j w_tj)

        sink_t is the sink where any token before the window has a weight, else 0.
        """
        assert self.mixer.window is not None
        window, (B, T) = self.mixer.window, q.shape[:2]
        new = {"keys": k, "values": v, "features": phi_k}
        new["valid"] = q.new_ones(B, T, dtype=torch.bool) if mask is None else mask
        past = memory or {n: z.new_zeros(B, window, *z.shape[2:]) for n, z in new.items()}
        slots = {name: torch.cat([past[name], z], dim=1) for name, z in new.items()}
        order = None
        if mask is not None:
            # Tokens move to the right end, behind all padding, so that W slots are W tokens.
            order = torch.argsort(slots["valid"].int(), dim=1, stable=True)
            slots = {name: gathered(z, order) for name, z in slots.items()}
            front = (0, 0, 0, 0, window, 0)
            q, phi_q = (gathered(F.pad(z, front), order)[:, window:] for z in (q, phi_q))
        k, v, phi_k, valid = (slots[name] for name in ("keys", "values", "features", "valid"))
        # Empty slots hold zeros, which write nothing; but they decay what is there.
        written = None if not memory and mask is None else valid[:, :T]
        far, state = linear_attention(
            phi_q, phi_k[:, :T], with_ones(v[:, :T]), self._slope(v), memory.get("state"), written
        )
        with torch.autocast(q.device.type, enabled=False):
            far, sums = far[..., :-1], far[..., -1]
            empty = sums <= 0
            mass = torch.log(sums.masked_fill(empty, 1.0)) + self.log_far_gain.float()
            far = far / sums.masked_fill(empty, 1.0)[..., None]
            if self.mixer.sink:
                both = torch.logaddexp(mass, self.log_sink.float())
                far, mass = far * torch.exp(mass - both)[..., None], both
            far, mass = far.masked_fill(empty[..., None], 0.0), mass.masked_fill(empty, NEVER)
            # Scores may leave the range of float16.
            dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
            outputs = []
            for start in range(0, T, SEGMENT):
                rows = slice(start, start + SEGMENT)
                span = slice(start, start + SEGMENT + window)
                outputs.append(
                    window_softmax(
                        q[:, rows], k[:, span], v[:, span], valid[:, span], far[:, rows],
                        mass[:, rows], window,
                    )
                )  # fmt: skip
            out = torch.cat(outputs, dim=1)
        if order is not None:
            places = torch.argsort(order, dim=1)
            out = gathered(F.pad(out, (0, 0, 0, 0, window, 0)), places)[:, window:]
        # Copied, so that the memory of what lies before them is given back.
        kept = {name: z[:, T:].clone() for name, z in slots.items()}
        return out, {**kept, "state": state}


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """x (B, S, ...) with the slots of each row in ``order`` (B, S)."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(x.shape))


# --- the model ------------------------------------------------------------------------------


class SupraLayer(GradientCheckpointingLayer):
    """A residual block: mixer, then feed-forward network, with norms before, after or both."""

    def __init__(
        self, config: SupraConfig, mixer: Mixer, index: int, experts: Experts | None = None
    ) -> None:
        super().__init__()
        self.index, self.residual_scale = index, config.residual_scale
        self.before, self.after = config.block_norm != "after", config.block_norm != "before"
        D = config.hidden_size
        if self.before:
            self.input_layernorm = Norm(D, config)
            self.post_attention_layernorm = Norm(D, config)
        if self.after:
            self.mixer_output_norm, self.mlp_output_norm = Norm(D, config), Norm(D, config)
        self.self_attn: SoftmaxMixer | LinearMixer
        if is_linear(mixer):
            self.self_attn = LinearMixer(config, mixer)
        elif is_softmax(mixer):
            self.self_attn = SoftmaxMixer(config, mixer)
        self.mlp: FeedForward | MixtureOfExperts
        if experts is None:
            self.mlp = FeedForward(config, config.intermediate_size, config.mlp_bias)
        else:
            self.mlp = MixtureOfExperts(config, experts)

    def forward(
        self,
        h: Tensor,
        rotations: Rotations,
        mask: Tensor | None = None,
        past_key_values: SupraCache | None = None,
    ) -> Tensor:
        """h (B, T, D) -> (B, T, D); the cache's memory of this layer is replaced."""
        memory = {} if past_key_values is None else past_key_values.memory[self.index]
        x = self.input_layernorm(h) if self.before else h
        x, memory = self.self_attn(x, rotations, mask, memory)
        if past_key_values is not None:
            past_key_values.memory[self.index] = memory
        h = self._added(h, self.mixer_output_norm(x) if self.after else x)
        x = self.mlp(self.post_attention_layernorm(h) if self.before else h)
        return self._added(h, self.mlp_output_norm(x) if self.after else x)

    def _added(self, h: Tensor, x: Tensor) -> Tensor:
        return h + (x if self.residual_scale == 1.0 else x * self.residual_scale)


class SupraPreTrainedModel(PreTrainedModel):
    """What all supra models share for transformers."""

    config_class = SupraConfig
    config: SupraConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SupraLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = list(FLOAT32_PARAMETERS)
    # Softmax layers are computed by torch's own attention; there is no other implementation.
    _supports_sdpa = True
    # A state cannot be set back by some tokens, as assisted decoding needs it.
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """The model makes its own cache."""
        return False

    @classmethod
    def from_pretrained(cls, *given: Any, output_loading_info: bool = False, **more: Any) -> Any:
        """As transformers', but tensors that are missing or unexpected are an error.

        A model with a tensor drawn by chance, or one left out, would compute something else.
        """
        loaded: Any = super().from_pretrained(*given, output_loading_info=True, **more)
        model, info = loaded
        wrong = {
            "missing": list(info["missing_keys"]),
            # The trunk alone leaves out the head.
            "unexpected": [name for name in info["unexpected_keys"] if name != "lm_head.weight"],
        }
        for problem, names in wrong.items():
            if names:
                raise ValueError(
                    f"the weights do not match config.json: {', '.join(sorted(names)[:4])} "
                    f"({len(names)} in all) {problem}; get the folder again or convert it again"
                )
        return (model, info) if output_loading_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """For a model that is trained from scratch; a folder's weights are all stored."""
        super()._init_weights(module)
        if isinstance(module, Norm):
            init.constant_(module.weight, 1.0 - module.offset)
        elif isinstance(module, FeatureProjection):
            init.normal_(module.weight, mean=0.0, std=module.weight.shape[-1] ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, LinearMixer):
            if module.mixer.slopes is None:
                # Lightning attention's, which a learned decay begins with.
                power = -8.0 * torch.arange(1, module.heads + 1) / module.heads
                init.copy_(module.log_slope, power * math.log(2.0))
            if module.mixer.gain != "none":
                init.ones_(module.gain)
            if module.mixer.window is not None:
                init.zeros_(module.log_far_gain)
            if module.mixer.sink:
                init.zeros_(module.log_sink)


class SupraModel(SupraPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config: SupraConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embed_norm = Norm(config.hidden_size, config)
        mixers = config.layers()
        experts = config.feed_forwards()
        self.layers = nn.ModuleList(
            SupraLayer(config, mixer, index, experts[index]) for index, mixer in enumerate(mixers)
        )
        self.norm = Norm(config.hidden_size, config)
        self._ropes: dict[str, tuple[Rope, int]] = {}
        for mixer in mixers:
            name, width = rotation_name(config, mixer), config.rotated_width(mixer)
            if name is not None and width is not None:
                self._ropes[name] = (config.ropes()[mixer.rotary], width)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SupraCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Hidden states (B, T, D) of input_ids (B, T), or of their embeddings.

        ``attention_mask`` (B, T), or (B, past + T) of which the last T columns count: 0 for
        padding, on any side. ``past_key_values``: what an earlier call returned; it is changed.
        ``hidden_states``: what enters each layer, and the result. Raises ValueError for what the
        model does not compute: attention weights, masks of other shapes, packed positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError("linear attention makes no attention weights: leave output_attentions")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        checkpointing = self.gradient_checkpointing and self.training
        cache = self._cache(past_key_values, use_cache, h.shape[0], checkpointing)
        mask = self._new_tokens(attention_mask, h.shape[1], 0 if cache is None else cache.seen)
        places = self._places(h, mask, cache)
        if position_ids is not None:
            self._check_positions(position_ids, places, mask)
        if self.config.embedding_scale != 1.0:
            # Rounded to the weights' type, as transformers' own models multiply.
            h = h * torch.tensor(self.config.embedding_scale, dtype=h.dtype)
        if self.config.embedding_norm:
            h = self.embed_norm(h)

        rotations = self._rotations(places)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        entered: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if output_hidden_states:
                entered += (h,)
            h = layer(h, rotations, mask=mask, past_key_values=cache)
        h = self.norm(h)
        if cache is not None:
            cache.seen += h.shape[1]
            new = places.new_full(h.shape[:1], h.shape[1]) if mask is None else mask.long().sum(1)
            cache.tokens = new if cache.tokens is None else cache.tokens + new
        output = BaseModelOutputWithPast(
            last_hidden_state=h,
            past_key_values=cache,
            hidden_states=(*entered, h) if output_hidden_states else None,
        )
        return output if self._as_dictionary(return_dict) else output.to_tuple()

    def _as_dictionary(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _cache(
        self, given: Any, use_cache: bool | None, batch: int, checkpointing: bool
    ) -> SupraCache | None:
        if given is not None and not isinstance(given, SupraCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}, but a supra model goes on from what "
                "it returned itself: leave it out at the first call"
            )
        if given is not None and given.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values holds {given.batch_size} sequences, but {batch} go on: call its "
                "batch_repeat_interleave or batch_select_indices"
            )
        if checkpointing:
            if given is not None and given.seen:
                raise ValueError("gradient checkpointing cannot go on from past_key_values")
            return None
        if given is not None:
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        return SupraCache(len(self.layers)) if use_cache else None

    @staticmethod
    def _new_tokens(attention_mask: Tensor | None, T: int, past: int) -> Tensor | None:
        """Which of the new tokens are no padding, (B, T) bool; None if all are."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (T, past + T):
            raise ValueError(
                f"attention_mask must have a column for each of {T} tokens, or of {past} + {T} "
                f"with those before them, not the shape {tuple(attention_mask.shape)}"
            )
        mask = attention_mask[:, -T:] != 0
        return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask

    @staticmethod
    def _places(h: Tensor, mask: Tensor | None, cache: SupraCache | None) -> Tensor:
        """Positions of the tokens, (B or 1, T); padding does not count."""
        if mask is None:
            places = torch.arange(h.shape[1], device=h.device)[None]
        else:
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
        if cache is None or cache.tokens is None:
            return places
        return places + cache.tokens.to(h.device)[:, None]

    @staticmethod
    def _check_positions(given: Tensor, places: Tensor, mask: Tensor | None) -> None:
        given, places = torch.broadcast_tensors(given, places)
        differs = given != places
        if mask is not None:
            differs = differs & mask
        if bool(differs.any()):
            raise ValueError(
                "position_ids differ from the tokens' places, which a recurrent model follows: "
                "leave them out, and pad sequences instead of packing them"
            )

    def _rotations(self, places: Tensor) -> Rotations:
        """Cosines and sines, (B or 1, T, 1, R / 2) float32, by the names layers know them by.

        Both are multiplied by the rope's magnitude.
        """
        device = places.device
        # float64: a float32 angle is off by 4e-3 at position 65,536. Metal has no float64.
        places = places.to("cpu" if device.type == "mps" else device).double()
        rotations = {}
        for name, (rope, width) in self._ropes.items():
            theta = torch.tensor(rope.frequencies(width), dtype=torch.float64, device=places.device)
            angles = places[..., None, None] * theta
            cos, sin = rope.magnitude * angles.cos(), rope.magnitude * angles.sin()
            rotations[name] = (cos.float().to(device), sin.float().to(device))
        return rotations


class SupraForCausalLM(SupraPreTrainedModel, GenerationMixin):
    """The model with its head: logits, loss, and ``generate``."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SupraConfig) -> None:
        super().__init__(config)
        self.model = SupraModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SupraCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> Any:
        """Logits (B, T, V), as :meth:`SupraModel.forward` otherwise.

        ``labels`` (B, T): the tokens themselves, -100 where none counts; the loss is the mean of
        the next ones' in nats. ``logits_to_keep``: of the last so many tokens only, 0 for all.
        """
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        h = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        h = h[:, kept]
        divisor = self.config.logits_divisor
        logits = self.lm_head(h if divisor == 1.0 else h / divisor)
        logits = softcapped(logits, self.config.logits_softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **more
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
        )
        return output if self.model._as_dictionary(return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', without positions: the model counts tokens itself."""
        prepare: Any = GenerationMixin.prepare_inputs_for_generation
        inputs: dict[str, Any] = prepare(self, input_ids, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("position_ids", None)
        return inputs


__all__ = ["SupraCache", "SupraConfig", "SupraForCausalLM", "SupraModel", "SupraPreTrainedModel"]
