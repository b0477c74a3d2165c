"""Linear attention with a feature map: its state is of fixed size.

Shapes: x (B, T, D); q (B, T, H, ·), k and v (B, T, K, ·).
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_core.mixers.base import ModelFields
from supra_core.mixers.decay import slopes
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import GroupNorm, Projection
from supra_torch.model.layers import Exact, FeatureProjection, NormLayer, Positions, activate, exact
from supra_torch.model.mixers.base import LayerState, MixerModule, OwnedLayerState, continued
from supra_torch.ops.linear_attention import linear_attention, of_sequences
from supra_torch.ops.step import StepInputs, linear_attention_step, linear_attention_step_
from supra_torch.ops.windowed_attention import WindowState, windowed_attention

if TYPE_CHECKING:
    from supra_torch.model.context_parallel import Before


class LinearMixer(MixerModule):
    """Keys are written into a state, which decays; a window of softmax may stand before it."""

    mixer: LinearAttention

    def __init__(self, spec: ModelFields, mixer: LinearAttention) -> None:
        phi, tensors = mixer.feature_map, mixer.tensors(spec)
        size = phi.size if mixer.folded else spec.head_dim
        super().__init__(spec, mixer, size, "q_proj.bias" in tensors)
        H, K, d = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.q_feature = self.k_feature = None
        if isinstance(phi.projection, Projection):
            self.q_feature = FeatureProjection(phi.projection, H, phi.size, d)
            if not phi.projection.shared:
                self.k_feature = FeatureProjection(phi.projection, K, phi.size, d)
        if mixer.qk_norm:
            self.q_norm = NormLayer(H * phi.output_size, spec.norm)
            self.k_norm = NormLayer(H * phi.output_size, spec.norm)
        if mixer.learned_decay:
            self.log_slope = nn.Parameter(torch.empty(H))
        else:
            self.fixed_slope = Exact(slopes(mixer.decay, H))
        if mixer.gain != "none":
            shape = (H,) if mixer.gain == "per_head" else (H, spec.value_head_dim)
            self.gain = nn.Parameter(torch.empty(shape))
        if mixer.window is not None:
            self.log_far_gain = nn.Parameter(torch.empty(H))
        self.log_sink = nn.Parameter(torch.empty(H)) if mixer.sink else None

    def can_search(self, teacher: MixerModule) -> bool:
        """Whether the heads have what the search sets, and the teacher's queries and keys."""
        mixer, projection = self.mixer, self.mixer.feature_map.projection
        theirs = getattr(teacher, "rotary", None)
        return (
            isinstance(projection, Projection)
            and projection.scope == "per_head"
            and not projection.shared
            and (
                mixer.rope_position in ("before", "between")
                or mixer.rope_position == theirs == "none"
            )
            and mixer.learned_decay
            and mixer.summed
            and mixer.gain != "none"
        )

    def slope(self) -> Tensor:
        """-ln gamma of each head, (H,) float64."""
        if self.mixer.learned_decay:
            return torch.exp(exact(self.log_slope))
        return self.fixed_slope.values

    def decay(self) -> Tensor:
        """gamma of each head, (H,) float64."""
        return torch.exp(-self.slope())

    def heads_output(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        mixer, state = self.mixer, continued(state, positions)
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
        normalise = self.mixer.summed
        sink = None if self.log_sink is None else self.log_sink.float().exp()
        if state is not None and mask is None and q.shape[1] == 1:
            owned = isinstance(state, OwnedLayerState)
            step = linear_attention_step_ if owned else linear_attention_step
            slope = self.slope().float().to(q.device)
            token = StepInputs(q[:, 0], k[:, 0], v[:, 0], slope, state["state"], normalise)
            out, final = step(token, sink=sink)
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
