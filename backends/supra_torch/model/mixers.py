"""The mixers: softmax attention with its cache, linear attention with its state.

Shapes: x (B, T, D); q (B, T, H, ·), k and v (B, T, K, ·).
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_core.mixers import decay as decays
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import Folded, GroupNorm, LearnedDecay, Projection, SumNormaliser
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec
from supra_torch.model.context_parallel import Before
from supra_torch.model.layers import Exact, FeatureProjection, NormLayer, Positions, activate
from supra_torch.model.visibility import Seen, seen_keys
from supra_torch.ops import WindowState, linear_attention, windowed_attention
from supra_torch.ops.linear_attention import of_sequences
from supra_torch.ops.step import linear_attention_step, linear_attention_step_
from supra_torch.ops.target import kind

LayerState = dict[str, Tensor]

# Queries whose mask is in memory at once.
_QUERIES = 4096


class OwnedLayerState(LayerState):
    """A layer's state that a decode step may overwrite."""


def _kept(state: LayerState | None, positions: Positions) -> LayerState | None:
    """The state before, empty for rows that begin a document of their own."""
    if state is None or positions.goes_on is None:
        return state
    kept = dict(state)
    if "valid" in state:
        kept["valid"] = state["valid"] & positions.goes_on[:, None]
    if "state" in state:
        kept["state"] = state["state"] * positions.goes_on[:, None, None, None]
    return kept


class Mixer(nn.Module):
    """The projections every mixer has.

    ``folded``: q_proj and k_proj hold a feature map, and the scale of the queries with it.
    """

    def __init__(
        self, spec: ModelSpec, query_size: int, query_bias: bool, folded: bool = False
    ) -> None:
        super().__init__()
        D, H, K = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
        bias = spec.attention_bias
        self.heads, self.key_value_heads = H, K
        self.q_proj = nn.Linear(D, H * query_size, bias=query_bias)
        self.k_proj = nn.Linear(D, K * query_size, bias=query_bias)
        self.v_proj = nn.Linear(D, K * spec.value_head_dim, bias=bias != "none")
        self.o_proj = nn.Linear(H * spec.value_head_dim, D, bias=bias == "qkvo")
        self.query_scale = 1.0 if folded else spec.query_scale
        self.per_head = spec.query_key_norm == "per_head"
        self.q_proj_norm = self.k_proj_norm = None
        if spec.query_key_norm != "none":
            d = spec.head_dim
            self.q_proj_norm = NormLayer(d if self.per_head else H * d, spec.norm)
            self.k_proj_norm = NormLayer(d if self.per_head else K * d, spec.norm)

    @property
    def projects_plainly(self) -> bool:
        """Whether queries and keys are products with q_proj and k_proj and nothing more."""
        return self.q_proj_norm is None and self.query_scale == 1.0

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, ·) and k (B, T, K, ·), normed and scaled."""
        q = self._normed(self.q_proj(x), self.q_proj_norm, self.heads)
        k = self._normed(self.k_proj(x), self.k_proj_norm, self.key_value_heads)
        return q if self.query_scale == 1.0 else q * self.query_scale, k

    def _normed(self, z: Tensor, norm: NormLayer | None, heads: int) -> Tensor:
        if norm is not None and not self.per_head:
            z = norm(z)
        z = z.unflatten(-1, (heads, -1))
        return norm(z) if norm is not None and self.per_head else z

    def values(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> v (B, T, K, Dv)."""
        return self.v_proj(x).unflatten(-1, (self.key_value_heads, -1))


class SoftmaxMixer(Mixer):
    """Softmax attention; its state holds keys, values and which of them are tokens.

    With a window, those of the window alone, padding before tokens.
    """

    def __init__(self, spec: ModelSpec, mixer: SoftmaxAttention) -> None:
        super().__init__(spec, spec.head_dim, spec.attention_bias != "none")
        self.window, self.rope = mixer.window, mixer.rotary
        self.softcap = spec.attention_softcap

    def rotated(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, d) and k (B, T, K, d), as the scores take them."""
        q, k = (positions.rotate(z, self.rope) for z in self.queries_and_keys(x))
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of q (B, H, T, d) to k, v (B, K, S, ·): (B, H, T, Dv).

        mask (T, S) or (B, 1, T, S) bool, None for all keys or, if ``causal``, those up to a
        query's own, S being T.
        """
        group = q.shape[1] // k.shape[1]
        # On a GPU what takes a mask takes no groups, or everything is computed at full length.
        if self.softcap is not None or (mask is not None and kind(q) == "cuda"):
            k, v = (z.repeat_interleave(group, dim=1) for z in (k, v))
        if self.softcap is None:
            grouped = k.shape[1] < q.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
        scores = q @ k.mT / (q.shape[-1] ** 0.5 * self.softcap)
        scores = self.softcap * torch.tanh(scores.float())
        if causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    def forward(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        (q, k), v = self.rotated(x, positions), self.values(x)
        state = _kept(state, positions)
        B, T = x.shape[:2]
        if positions.before is not None:
            assert state is None and mask is None
            out = self._shared(q, k, v, positions, positions.before)
            return self.o_proj(out.flatten(-2)), {}
        alike = state is None and mask is None and positions.documents is None
        seen = None
        if not alike or (self.window is not None and self.window < T):
            seen = seen_keys(B, T, positions, state, mask)
        memory = self._remember(k, v, positions, state, mask)
        if state is not None:
            k, v = (torch.cat([state[name], x], dim=1) for name, x in (("keys", k), ("values", v)))
        return self.o_proj(self._attended(q, k, v, seen, self.window).flatten(-2)), memory

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Seen | None, window: int | None
    ) -> Tensor:
        """Attention of q (B, T, H, d) to k, v (B, S, K, .): (B, T, H, Dv).

        ``seen`` None: of every query to all keys up to its own, S being T. Else some queries at a
        time, since a mask of all pairs would grow with the square of T.
        """
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if seen is None:
            return self.attend(q, k, v, None, causal=True).transpose(1, 2)
        T, S = q.shape[2], k.shape[2]
        found = []
        for first in range(0, T, _QUERIES):
            queries = slice(first, min(first + _QUERIES, T))
            keys = slice(seen.first_key(S - T + first, window), S - T + queries.stop)
            mask = seen.mask(queries, keys, window)
            found.append(self.attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, False))
        return (found[0] if len(found) == 1 else torch.cat(found, dim=2)).transpose(1, 2)

    def _shared(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, before: Before
    ) -> Tensor:
        """The heads' output (B, T, H, Dv) for a part of rows, of which others have the rest."""
        (B, T, H), part, seen = q.shape[:3], before.part, None
        whole, documents = before.places.shape[1], before.documents
        if self.window is None or self.window >= whole:
            k, v = (part.by_heads(x, of=H) for x in (k, v))
            if documents is not None:
                everywhere = replace(positions, positions=before.places, documents=documents)
                seen = seen_keys(B, whole, everywhere, None, None)
            out = self._attended(part.by_heads(q, of=H), k, v, seen, None)
            return part.by_tokens(out, H)
        slots = min(self.window - 1, whole - T)
        k, v = (torch.cat([before.last(x, slots), x], dim=1) for x in (k, v))
        state = {"valid": before.valid(slots), "positions": before.positions(slots)}
        return self._attended(q, k, v, seen_keys(B, T, positions, state, None), self.window)

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
        if positions.documents is not None:
            own = positions.documents
            valid = own == own[:, -1:]
            if state is not None:
                still = own[:, :1] == own[:, -1:]
                state = {**state, "valid": state["valid"] & still}
        place = positions.positions.expand(B, T)
        memory = {"keys": k, "values": v, "valid": valid, "positions": place}
        if state is not None:
            memory = {name: torch.cat([state[name], x], dim=1) for name, x in memory.items()}
        return memory if self.window is None else _last(memory, self.window - 1, mask is not None)


def _last(memory: LayerState, tokens: int, padded: bool) -> LayerState:
    """The last so many tokens of every row; ``padded``: what is no token may stand among them."""
    if padded:
        # To the front, whence it is dropped first.
        order = memory["valid"].byte().argsort(dim=1, stable=True)
        memory = {
            name: x.take_along_dim(order.view(*order.shape, *[1] * (x.ndim - 2)), dim=1)
            for name, x in memory.items()
        }
    dropped = max(0, memory["valid"].shape[1] - tokens)
    return {name: x[:, dropped:] for name, x in memory.items()}


class LinearMixer(Mixer):
    """Linear attention with a feature map; its state is of fixed size."""

    def __init__(self, spec: ModelSpec, mixer: LinearAttention) -> None:
        phi, bias = mixer.feature_map, spec.attention_bias != "none"
        folded = isinstance(phi.projection, Folded)
        if isinstance(phi.projection, Folded):
            bias = phi.projection.bias
        super().__init__(spec, phi.size if folded else spec.head_dim, bias, folded)
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
        mixer, state = self.mixer, _kept(state, positions)
        q, k = self._projected(x, positions)
        v = self.values(x)
        if mixer.window is not None:
            out, memory = self._windowed(q, k, v, positions, state, mask)
        else:
            # Under autocast a softmax is float32, which a GPU's products would take slowly.
            phi_q, phi_k = (z.to(v.dtype) for z in self._features(q, k, positions))
            if mixer.qk_norm:
                v = v.repeat_interleave(self.heads // v.shape[2], dim=2)
            out, final = self._attend(phi_q, phi_k, v, positions, state, mask)
            memory = {"state": final}
        if isinstance(mixer.normaliser, GroupNorm):
            out = F.layer_norm(out.float(), out.shape[-1:], eps=mixer.normaliser.eps).to(v.dtype)
        if mixer.gain != "none":
            out = (out * self.gain.view(self.heads, -1)).to(v.dtype)
        return out.to(v.dtype), memory

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
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
        B, packed = q.shape[0], positions.cu_seqlens
        before = None if state is None else state["state"]
        if positions.before is not None:
            own = positions.documents
            counted = None if own is None else own == own[:, -1:]
            before = positions.before.state(k, v, self.slope(), counted, normalise)
        q, k, v = (_as_packed(x, packed) for x in (q, k, v))
        if packed is not None and positions.documents is not None and before is not None:
            before = of_sequences(before, positions.documents[:, 0], len(packed) - 1)
        out, final = linear_attention(
            q,
            k,
            v,
            self.decay(),
            initial_state=before,
            mask=mask,
            cu_seqlens=packed,
            normaliser="sum" if normalise else None,
            sink=sink,
        )
        if positions.by_row and positions.documents is not None:
            final = final[positions.documents[:, -1]]
        return out.view(B, -1, *out.shape[2:]), final

    def _windowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, LayerState]:
        assert self.mixer.window is not None
        B, packed = q.shape[0], positions.cu_seqlens
        if not positions.by_row:
            q, k, v = (_as_packed(x, packed) for x in (q, k, v))
        phi_q, phi_k = (activate(self.mixer.feature_map.activation, z) for z in (q, k))
        phi_k = self._scaled(phi_k)
        before = None if state is None else WindowState(**state)
        if positions.before is not None:
            before = self._window_before(k, v, phi_k.to(v.dtype), positions, positions.before)
        out, memory = windowed_attention(
            q,
            k,
            v,
            phi_q,
            phi_k,
            self.decay(),
            self.log_far_gain,
            self.mixer.window,
            log_sink=self.log_sink,
            initial_state=before,
            mask=mask,
            cu_seqlens=packed,
        )
        out = out.view(B, -1, *out.shape[2:])
        return out, {field.name: getattr(memory, field.name) for field in fields(memory)}

    def _window_before(
        self, k: Tensor, v: Tensor, phi_k: Tensor, positions: Positions, before: Before
    ) -> WindowState:
        """What a part of rows begins with, whose earlier tokens other processes compute."""
        assert self.mixer.window is not None
        W, T = self.mixer.window, k.shape[1]
        keys, values, features = (before.last(x, W) for x in (k, v, phi_k))
        valid, documents = before.valid(W), positions.documents
        if documents is None:
            documents = torch.zeros(k.shape[:2], dtype=torch.long, device=k.device)
        # The state is of tokens that lag W behind.
        lagging = torch.cat([documents[:, :1].where(valid, -1), documents], dim=1)[:, :T]
        lagging_k, lagging_v = (
            torch.cat([x, y], dim=1)[:, :T] for x, y in ((features, phi_k), (values, v))
        )
        counted = lagging == documents[:, -1:]
        state = before.state(lagging_k, lagging_v, self.slope(), counted, True)
        return WindowState(keys, values, features, valid, state)

    def _features(self, q: Tensor, k: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """phi(q) (B, T, H, Dk) and scaled phi(k) (B, T, K or H, Dk), every rotation included."""
        q, k = (activate(self.mixer.feature_map.activation, z) for z in (q, k))
        if self.mixer.qk_norm:
            k = k.repeat_interleave(self.heads // k.shape[2], dim=2)
            q = self.q_norm(q.flatten(-2)).view(q.shape)
            k = self.k_norm(k.flatten(-2)).view(k.shape)
        if self.mixer.rope_position == "after":
            q, k = (positions.rotate(z, self.mixer.rotary) for z in (q, k))
        return q, self._scaled(k)

    def _projected(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """What the activation receives: q (B, T, H, size), k (B, T, K, size)."""
        if self.q_feature is None:
            q, k = self.queries_and_keys(x)
        elif self.mixer.rope_position == "before":
            q, k = (positions.rotate(z, self.mixer.rotary) for z in self.queries_and_keys(x))
            return self.q_feature(q), (self.k_feature or self.q_feature)(k)
        elif self.projects_plainly:
            q = self.q_feature.after(self.q_proj, x)
            k = (self.k_feature or self.q_feature).after(self.k_proj, x)
        else:
            q, k = self.queries_and_keys(x)
            q, k = self.q_feature(q), (self.k_feature or self.q_feature)(k)
        if self.mixer.rope_position in ("before", "between"):
            q, k = (positions.rotate(z, self.mixer.rotary) for z in (q, k))
        return q, k

    def _scaled(self, k: Tensor) -> Tensor:
        return k if self.mixer.key_scale == 1.0 else k * self.mixer.key_scale


def _as_packed(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x (B, T, heads, D) as one row of B T tokens, where documents are packed."""
    return x if cu_seqlens is None else x.flatten(0, 1)[None]
