"""A plain ``nn.Module`` built from a spec; parameter names are the canonical layout's.

Shapes: ids (B, T); hidden states (B, T, D); q (B, T, H, ·), k and v (B, T, K, ·).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from supra_core import decay as decays
from supra_core import layout
from supra_core.rotary import inverse_frequencies
from supra_core.spec import (
    Folded,
    GroupNorm,
    LearnedDecay,
    LinearAttention,
    ModelSpec,
    Norm,
    Projection,
    SoftmaxAttention,
    SumNormaliser,
)
from supra_core.tensors import BFLOAT16, LazyTensor
from supra_torch.ops import WindowState, linear_attention, rotate, windowed_attention
from supra_torch.ops.rms_norm import rms_norm
from supra_torch.ops.step import linear_attention_step, linear_attention_step_

LayerState = dict[str, Tensor]


class OwnedLayerState(LayerState):
    """A layer's state that a decode step may overwrite."""


@dataclass(frozen=True)
class ModelState:
    """What a batch of sequences remembers: tokens seen (B,), and named tensors a layer."""

    tokens: Tensor
    layers: tuple[LayerState, ...]


class Exact(nn.Module):
    """A float64 constant that follows the module's device and is never rounded by a cast."""

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("values", torch.from_numpy(values), persistent=False)
        self.values: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exact:
        before = self.values
        super()._apply(fn, recurse)
        self.values = before.to(self.values.device)
        return self


@dataclass(frozen=True)
class Positions:
    """The tokens' positions (B, T), and their rotation.

    ``tables``: for each number of channels the angles' cosines and sines, (B, T, 1, channels / 2)
    float32, computed once a forward.
    """

    positions: Tensor
    tables: Mapping[int, tuple[Tensor, Tensor]]
    pairing: str

    def rotate(self, x: Tensor) -> Tensor:
        """x (B, T, heads, channels) rotated in float32, returned in its own type."""
        cos, sin = self.tables[x.shape[-1]]
        return rotate(x, cos, sin, self.pairing == "half")


class NormLayer(nn.Module):
    """RMSNorm, or LayerNorm with a gain only, computed in float32."""

    def __init__(self, size: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm.kind == "rms_norm":
            out = rms_norm(x.float(), self.weight.float(), self.norm.eps)
        else:
            out = F.layer_norm(
                x.float(), self.weight.shape, self.weight.float(), None, self.norm.eps
            )
        return out.to(x.dtype)


class FeatureProjection(nn.Module):
    """The learned part of a feature map, over all heads together or for each head."""

    def __init__(self, projection: Projection, heads: int, size: int, channels: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.per_head = projection.scope == "per_head"
        if self.per_head:
            weight, bias = (heads, size, channels), (heads, size)
        else:
            weight, bias = (heads * size, heads * channels), (heads * size,)  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = nn.Parameter(torch.empty(bias)) if projection.bias else None

    def forward(self, z: Tensor) -> Tensor:
        if not self.per_head:
            z = F.linear(z.flatten(-2), self.weight, self.bias)
            return z.unflatten(-1, (self.heads, self.size))
        z = torch.einsum("bthd,hfd->bthf", z, self.weight)
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def after(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """The map of x (B, T, D) projected to heads: (B, T, heads, size).

        For many tokens the two matrices of each head are multiplied first: D rows, not B T, go
        through the second, and nothing between them is kept for backward.
        """
        if not self.per_head or x.shape[0] * x.shape[1] < x.shape[2]:
            return self(projection(x).unflatten(-1, (self.heads, -1)))
        with torch.autocast(x.device.type, enabled=False):
            channels = self.weight.shape[2]
            weight = (self.weight @ projection.weight.view(self.heads, channels, -1)).flatten(0, 1)
            bias: Tensor | None = self.bias
            if projection.bias is not None:
                moved = (self.weight @ projection.bias.view(self.heads, channels, 1)).squeeze(-1)
                bias = moved if bias is None else bias + moved
        out = F.linear(x, weight, None if bias is None else bias.flatten())
        return out.unflatten(-1, (self.heads, -1))


class Mixer(nn.Module):
    """The projections every mixer has."""

    def __init__(self, spec: ModelSpec, query_size: int, query_bias: bool) -> None:
        super().__init__()
        D, H, K = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
        bias = spec.attention_bias
        self.heads, self.key_value_heads = H, K
        self.q_proj = nn.Linear(D, H * query_size, bias=query_bias)
        self.k_proj = nn.Linear(D, K * query_size, bias=query_bias)
        self.v_proj = nn.Linear(D, K * spec.value_head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(H * spec.value_head_dim, D, bias=bias == "qkvo")

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, ·) and k (B, T, K, ·)."""
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.key_value_heads, -1))
        return q, k

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> v (B, T, K, Dv)."""
        return self.v_proj(x).unflatten(-1, (self.key_value_heads, -1))


class SoftmaxMixer(Mixer):
    """Softmax attention; its state holds keys, values and which of them are tokens."""

    def __init__(self, spec: ModelSpec, mixer: SoftmaxAttention) -> None:
        super().__init__(spec, spec.head_dim, spec.attention_bias != "none")
        self.window = mixer.window

    def forward(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        q, k = self.queries_and_keys(x)
        q, k, v = positions.rotate(q), positions.rotate(k), self.values(x)
        B, T = x.shape[:2]
        if state is None and mask is None and (self.window is None or self.window >= T):
            bias = None
        else:
            bias = self._mask(B, T, positions, state, mask)
        memory = self._remember(k, v, positions, state, mask)
        if state is not None:
            k, v = (torch.cat([state[name], x], dim=1) for name, x in (("keys", k), ("values", v)))
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=bias,
            is_causal=bias is None,
            enable_gqa=True,
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2)), memory

    def _mask(
        self,
        B: int,
        T: int,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Which keys each query sees: (B, 1, T, S) bool."""
        device = positions.positions.device
        valid = torch.ones(B, T, dtype=torch.bool, device=device) if mask is None else mask
        place = positions.positions.expand(B, T)
        key_place = place
        if state is not None:
            valid = torch.cat([state["valid"], valid], dim=1)
            key_place = torch.cat([state["positions"], place], dim=1)
        S = valid.shape[1]
        slot = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
        seen = (slot >= 0) & valid[:, None]
        if self.window is not None:
            seen &= place[:, :, None] - key_place[:, None] < self.window
        # A padding query sees itself: an empty row would be NaN.
        return (seen | (slot == 0))[:, None]

    def _remember(
        self,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
    ) -> LayerState:
        B, T = k.shape[:2]
        valid = torch.ones(B, T, dtype=torch.bool, device=k.device) if mask is None else mask
        place = positions.positions.expand(B, T)
        new = {"keys": k, "values": v, "valid": valid, "positions": place}
        if state is None:
            return new
        return {name: torch.cat([state[name], x], dim=1) for name, x in new.items()}


class LinearMixer(Mixer):
    """Linear attention with a feature map; its state is of fixed size."""

    def __init__(self, spec: ModelSpec, mixer: LinearAttention) -> None:
        phi, bias = mixer.feature_map, spec.attention_bias != "none"
        folded = isinstance(phi.projection, Folded)
        if isinstance(phi.projection, Folded):
            bias = phi.projection.bias
        super().__init__(spec, phi.size if folded else spec.head_dim, bias)
        self.mixer = mixer
        H, K, d = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.q_feature = self.k_feature = None
        if isinstance(phi.projection, Projection):
            self.q_feature = FeatureProjection(phi.projection, H, phi.size, d)
            if not phi.projection.shared:
                self.k_feature = FeatureProjection(phi.projection, K, phi.size, d)
        if mixer.qk_norm:
            self.q_norm = NormLayer(H * phi.output_size, spec.norm)
            self.k_norm = NormLayer(H * phi.output_size, spec.norm)
        if isinstance(mixer.decay, LearnedDecay):
            self.log_slope = nn.Parameter(torch.empty(H))
        else:
            self.fixed_slope = Exact(decays.slopes(mixer.decay, H))
        if mixer.gain != "none":
            shape = (H,) if mixer.gain == "per_head" else (H, spec.value_head_dim)
            self.gain = nn.Parameter(torch.empty(shape))
        if mixer.window is not None:
            self.log_far_gain = nn.Parameter(torch.empty(H))
        sink = isinstance(mixer.normaliser, SumNormaliser) and mixer.normaliser.sink
        self.log_sink = nn.Parameter(torch.empty(H)) if sink else None

    def slope(self) -> Tensor:
        """-ln gamma of each head, (H,) float64."""
        if isinstance(self.mixer.decay, LearnedDecay):
            return torch.exp(self.log_slope.double())
        return self.fixed_slope.values

    def decay(self) -> Tensor:
        """gamma of each head, (H,) float64."""
        return torch.exp(-self.slope())

    def forward(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        out, memory = self.heads_output(x, positions, state, mask)
        return self.o_proj(out.flatten(-2)), memory

    def heads_output(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """What o_proj receives, (B, T, H, Dv), and the new state."""
        mixer = self.mixer
        q, k = self._projected(x, positions)
        v = self.values(x)
        if mixer.window is not None:
            out, memory = self._windowed(q, k, v, state, mask)
        else:
            phi_q, phi_k = self._features(q, k, positions)
            if mixer.qk_norm:
                v = v.repeat_interleave(self.heads // v.shape[2], dim=2)
            out, final = self._attend(phi_q, phi_k, v, state, mask)
            memory = {"state": final}
        if isinstance(mixer.normaliser, GroupNorm):
            out = F.layer_norm(out.float(), out.shape[-1:], eps=mixer.normaliser.eps).to(v.dtype)
        if mixer.gain != "none":
            out = (out * self.gain.view(self.heads, -1)).to(v.dtype)
        return out.to(v.dtype), memory

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Linear attention: the output (B, T, H, Dv) and the final state."""
        normalise = isinstance(self.mixer.normaliser, SumNormaliser)
        sink = None if self.log_sink is None else self.log_sink.float().exp()
        if state is not None and mask is None and q.shape[1] == 1:
            step = (
                linear_attention_step_
                if isinstance(state, OwnedLayerState)
                else linear_attention_step
            )
            out, final = step(
                q[:, 0], k[:, 0], v[:, 0], self.slope().float(), state["state"], normalise,
                sink=sink,
            )  # fmt: skip
            return out[:, None], final
        return linear_attention(
            q,
            k,
            v,
            self.decay(),
            initial_state=None if state is None else state["state"],
            mask=mask,
            normaliser="sum" if normalise else None,
            sink=sink,
        )

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: LayerState | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        assert self.mixer.window is not None
        phi_q, phi_k = (activate(self.mixer.feature_map.activation, z) for z in (q, k))
        out, memory = windowed_attention(
            q,
            k,
            v,
            phi_q,
            self._scaled(phi_k),
            self.decay(),
            self.log_far_gain,
            self.mixer.window,
            log_sink=self.log_sink,
            initial_state=None if state is None else WindowState(**state),
            mask=mask,
        )
        return out, {field.name: getattr(memory, field.name) for field in fields(memory)}

    def _features(self, q: Tensor, k: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """phi(q) (B, T, H, Dk) and scaled phi(k) (B, T, K or H, Dk), every rotation included."""
        q, k = (activate(self.mixer.feature_map.activation, z) for z in (q, k))
        if self.mixer.qk_norm:
            k = k.repeat_interleave(self.heads // k.shape[2], dim=2)
            q = self.q_norm(q.flatten(-2)).view(q.shape)
            k = self.k_norm(k.flatten(-2)).view(k.shape)
        if self.mixer.rope == "after":
            q, k = positions.rotate(q), positions.rotate(k)
        return q, self._scaled(k)

    def _projected(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """What the activation receives: q (B, T, H, size), k (B, T, K, size)."""
        if self.q_feature is None:
            q, k = self.queries_and_keys(x)
        elif self.mixer.rope == "before":
            q, k = self.queries_and_keys(x)
            q, k = positions.rotate(q), positions.rotate(k)
            return self.q_feature(q), (self.k_feature or self.q_feature)(k)
        else:
            q = self.q_feature.after(self.q_proj, x)
            k = (self.k_feature or self.q_feature).after(self.k_proj, x)
        if self.mixer.rope in ("before", "between"):
            q, k = positions.rotate(q), positions.rotate(k)
        return q, k

    def _scaled(self, k: Tensor) -> Tensor:
        return k if self.mixer.key_scale == 1.0 else k * self.mixer.key_scale


def activate(activation: str, z: Tensor) -> Tensor:
    """A feature map's activation over the last axis; signed ones double it."""
    if activation == "relu":
        return torch.relu(z)
    if activation == "signed_relu":
        return torch.cat([torch.relu(z), torch.relu(-z)], dim=-1)
    if activation == "signed_softmax":
        # Computed in float32 and rounded once, whatever the type of z.
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)
    return z


def for_products(x: Tensor) -> Tensor:
    """x in the type autocast multiplies in, where it is enabled."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        D, F_ = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """A pre-norm residual block."""

    def __init__(self, spec: ModelSpec, mixer: SoftmaxAttention | LinearAttention) -> None:
        super().__init__()
        self.input_layernorm = NormLayer(spec.hidden_size, spec.norm)
        self.self_attn: SoftmaxMixer | LinearMixer = (
            SoftmaxMixer(spec, mixer)
            if isinstance(mixer, SoftmaxAttention)
            else LinearMixer(spec, mixer)
        )
        self.post_attention_layernorm = NormLayer(spec.hidden_size, spec.norm)
        self.mlp = FeedForward(spec)

    def forward(
        self, h: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        mixed, memory = self.self_attn(self.mixer_input(h), positions, state, mask)
        h = h + mixed
        return h + self.feed_forward(h), memory

    def mixer_input(self, h: Tensor) -> Tensor:
        """The normed h (B, T, D), cast once for all projections of it."""
        return for_products(self.input_layernorm(h))

    def feed_forward(self, h: Tensor) -> Tensor:
        """What the second half of the block adds to h (B, T, D)."""
        out: Tensor = self.mlp(for_products(self.post_attention_layernorm(h)))
        return out


def _rotated_channels(spec: ModelSpec) -> set[int]:
    """The widths that any layer rotates."""
    widths = set()
    for mixer in (layer.mixer for layer in spec.layers):
        if isinstance(mixer, SoftmaxAttention):
            widths.add(spec.head_dim)
            continue
        phi = mixer.feature_map
        sizes = {"before": spec.head_dim, "between": phi.size, "after": phi.output_size}
        if mixer.rope in sizes:
            widths.add(sizes[mixer.rope])
    return widths


class Trunk(nn.Module):
    """Embedding, layers and the last norm; the level that names begin with ``model.``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_norm = NormLayer(spec.hidden_size, spec.norm) if spec.embedding_norm else None
        self.layers = nn.ModuleList(Layer(spec, layer.mixer) for layer in spec.layers)
        self.norm = NormLayer(spec.hidden_size, spec.norm)


class SupraModel(nn.Module):
    """Any model a spec can describe.

    ``activation_checkpointing``: keep only what enters each layer for backward, and compute the
    layer again there.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec)
        self.activation_checkpointing = False
        self.frequencies = nn.ModuleDict(
            {
                str(channels): Exact(inverse_frequencies(spec.rope, channels))
                for channels in sorted(_rotated_channels(spec))
            }
        )
        self.lm_head = (
            None
            if spec.tie_word_embeddings
            else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output embedding, tied or not."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D), what the first layer receives."""
        h: Tensor = self.model.embed_tokens(ids)
        return h if self.model.embed_norm is None else self.model.embed_norm(h)

    def positions(
        self, ids: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> Positions:
        """Where the tokens of ids (B, T) stand; padding does not count."""
        if mask is not None:
            steps = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            steps = torch.arange(ids.shape[1], device=ids.device)[None]
        if state is not None:
            steps = steps + state.tokens[:, None]
        tables = {}
        for channels, theta in self.frequencies.items():
            assert isinstance(theta, Exact)
            # float64: a float32 angle is off by 4e-3 at position 65,536.
            angles = steps.double()[..., None, None] * theta.values
            tables[int(channels)] = (angles.cos().float(), angles.sin().float())
        return Positions(steps, tables, self.spec.rope.pairing)

    def hidden(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        *,
        streams: list[Tensor] | None = None,
    ) -> tuple[Tensor, ModelState]:
        """The normed last hidden states (B, T, D) and the state after ids (B, T).

        To ``streams`` the residual stream (B, T, D) after each layer is appended.
        """
        positions = self.positions(ids, state, mask)
        h, memories = self.embed(ids), []
        for index, layer in enumerate(self.model.layers):
            before = None if state is None else state.layers[index]
            if self.activation_checkpointing and torch.is_grad_enabled():
                h, memory = checkpoint(
                    layer, h, positions, before, mask, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h, memory = layer(h, positions, before, mask)
            memories.append(memory)
            if streams is not None:
                streams.append(h)
        new = ids.new_full(ids.shape[:1], ids.shape[1]) if mask is None else mask.long().sum(1)
        tokens = new if state is None else state.tokens + new
        return self.model.norm(h), ModelState(tokens, tuple(memories))

    def forward(
        self, ids: Tensor, state: ModelState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Logits (B, T, V) and the state after ids (B, T); mask (B, T) bool, False for padding."""
        h, after = self.hidden(ids, state, mask)
        return F.linear(h, self.head_weight.to(h.dtype)), after


def to_torch(tensor: LazyTensor) -> Tensor:
    """A lazy tensor's numbers in torch, in their own type, owned by torch."""
    array = np.ascontiguousarray(tensor.read())
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def build(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], *, dtype: torch.dtype | None = None
) -> SupraModel:
    """The module with these weights; ``dtype`` None keeps the weights' own.

    Small decay and gain tensors stay float32. Raises LayoutError when names or shapes differ
    from the spec's.
    """
    layout.check_tensors(spec, {name: t.shape for name, t in tensors.items()}, "the model")
    with torch.device("meta"):
        model = SupraModel(spec)
    weights = {}
    for name, tensor in tensors.items():
        keep = name.endswith(layout.FLOAT32_SUFFIXES)
        weights[name] = to_torch(tensor).to(torch.float32 if keep else dtype)
    model.load_state_dict(weights, assign=True, strict=True)
    return model


def build_layer(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], index: int, *, dtype: torch.dtype
) -> Layer:
    """One layer of the model alone, with its weights, as :func:`build` would make it."""
    with torch.device("meta"):
        layer = Layer(spec, spec.layers[index].mixer)
    prefix, weights = layout.layer_prefix(index), {}
    for name in layer.state_dict():
        keep = name.endswith(layout.FLOAT32_SUFFIXES)
        weights[name] = to_torch(tensors[prefix + name]).to(torch.float32 if keep else dtype)
    layer.load_state_dict(weights, assign=True, strict=True)
    return layer


def lazy_tensors(model: SupraModel) -> dict[str, LazyTensor]:
    """The module's weights under their canonical names, for a writer; float32 or float16."""
    return {
        name: LazyTensor.of(tensor.detach().cpu().numpy())
        for name, tensor in model.state_dict().items()
    }
