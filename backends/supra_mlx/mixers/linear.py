"""Linear attention, with or without a softmax window."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import ArraysCache

from supra_core.mixers.decay import slopes
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import FeatureMap, GroupNorm, LearnedDecay, Projection
from supra_core.model.spec import ModelSpec
from supra_mlx.mixers.base import ArraysMixer, Context
from supra_mlx.norms import norm_module
from supra_mlx.ops import linear_attention
from supra_mlx.rotary import Rotate
from supra_mlx.windowed_attention import WindowMemory, windowed_attention


class LinearMixer(ArraysMixer):
    """Linear attention with every choice of :class:`~supra_core.mixers.linear.LinearAttention`."""

    # Those after the first two are the window's.
    slots = ("state", "positions", "keys", "values", "features")
    finer_matrices = (*ArraysMixer.finer_matrices, "q_feature", "k_feature")

    def __init__(self, spec: ModelSpec, mixer: LinearAttention) -> None:
        super().__init__(spec, mixer)
        shapes = mixer.tensors(spec)
        for name in ("q_feature", "k_feature"):
            if f"{name}.weight" in shapes:
                setattr(self, name, _feature_projection(shapes, name, mixer.feature_map))
        for name in ("q_norm", "k_norm"):
            if f"{name}.weight" in shapes:
                setattr(self, name, norm_module(spec.norm, shapes[f"{name}.weight"][0]))
        for name in ("log_slope", "gain", "log_far_gain", "log_sink"):
            if name in shapes:
                setattr(self, name, mx.zeros(shapes[name]))
        self._spec, self._mixer = spec, mixer
        if not isinstance(mixer.decay, LearnedDecay):
            fixed = np.exp(-slopes(mixer.decay, spec.num_attention_heads))
            self._fixed_decay = mx.array(fixed.astype(np.float32))

    def __call__(self, x: mx.array, cache: ArraysCache, context: Context) -> mx.array:
        spec, mixer = self._spec, self._mixer
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x)
        rotate, H = context.rotations[mixer.rotary], spec.num_attention_heads
        z = self._projected(q, k, rotate)
        phi = _activate(mixer.feature_map.activation, z)
        z_q, z_k, phi_q, phi_k = z[:, :, :H], z[:, :, H:], phi[:, :, :H], phi[:, :, H:]
        if mixer.qk_norm:
            phi_q, phi_k, v = self._qk_norm(phi_q, phi_k, v)
        if mixer.rope_position == "after":
            phi_q, phi_k = rotate(phi_q), rotate(phi_k)
        if mixer.key_scale != 1.0:
            phi_k = phi_k * mixer.key_scale
        log_sink = self.log_sink if "log_sink" in self else None
        if mixer.window is None:
            out, cache[0] = linear_attention(
                phi_q, phi_k, v, self._decay(),
                initial_state=cache[0], mask=context.mask,
                normaliser="sum" if mixer.summed else None,
                sink=None if log_sink is None else mx.exp(log_sink),
            )  # fmt: skip
        else:
            buffers: list[Any] = cache.cache[2:]
            memory = None if cache[0] is None else WindowMemory(cache[0], *buffers)
            out, memory = windowed_attention(
                z_q, z_k, v, phi_q, phi_k, self._decay(), self.log_far_gain,
                mixer.window, log_sink=log_sink, memory=memory, seen=context.seen,
                mask=context.mask,
            )  # fmt: skip
            for slot, array in zip((0, 2, 3, 4), memory, strict=True):
                cache[slot] = array
        cache[1] = context.positions_after
        if isinstance(mixer.normaliser, GroupNorm):
            out = mx.fast.layer_norm(out, None, None, mixer.normaliser.eps)
        if mixer.gain != "none":
            out = out * (self.gain[:, None] if mixer.gain == "per_head" else self.gain)
        return self.o_proj(out.reshape(B, T, -1).astype(x.dtype))

    def _projected(self, q: mx.array, k: mx.array, rotate: Rotate) -> mx.array:
        """What the activation receives, (B, T, H + K, size): queries, then keys.

        Together they take half the operations, of which a decode step has too many.
        """
        phi, rope = self._mixer.feature_map, self._mixer.rope_position
        if rope == "before":
            q, k = rotate(q), rotate(k)
        if isinstance(phi.projection, Projection):
            q = self._feature(q, "q_feature")
            k = self._feature(k, "q_feature" if phi.projection.shared else "k_feature")
        z = mx.concatenate([q, k], axis=2)
        return rotate(z) if rope == "between" else z

    def _feature(self, z: mx.array, name: str) -> mx.array:
        """A feature map's learned part, (B, T, heads, d) -> (B, T, heads, size)."""
        phi = self._mixer.feature_map
        assert isinstance(phi.projection, Projection)
        if phi.projection.scope == "all_heads":
            return self[name](z.flatten(2)).reshape(*z.shape[:3], phi.size)
        return self[name](z)

    def _qk_norm(
        self, q: mx.array, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        # The norm's weight differs between the query heads of a group: k has to be repeated.
        k, v = (mx.repeat(x, self._spec.group_size, axis=2) for x in (k, v))
        q = self.q_norm(q.flatten(2)).reshape(q.shape)
        return q, self.k_norm(k.flatten(2)).reshape(k.shape), v

    def _decay(self) -> mx.array:
        """gamma (H,), float32."""
        if isinstance(self._mixer.decay, LearnedDecay):
            return mx.exp(-mx.exp(self.log_slope.astype(mx.float32)))
        return self._fixed_decay

    def make_cache(self, *, bounded: bool) -> ArraysCache:
        return ArraysCache(2 if self._mixer.window is None else len(self.slots))


class PerHeadLinear(nn.Module):
    """One linear map a head: weight (heads, out, in), bias (heads, out)."""

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = mx.zeros(shape)
        if bias:
            self.bias = mx.zeros(shape[:2])

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, heads, in) -> (B, T, heads, out)."""
        out = (x.transpose(0, 2, 1, 3) @ self.weight.swapaxes(-1, -2)).transpose(0, 2, 1, 3)
        return out + self.bias if "bias" in self else out


def _feature_projection(
    shapes: dict[str, tuple[int, ...]], name: str, phi: FeatureMap
) -> nn.Module:
    shape, bias = shapes[f"{name}.weight"], f"{name}.bias" in shapes
    assert isinstance(phi.projection, Projection)
    if phi.projection.scope == "all_heads":
        return nn.Linear(shape[1], shape[0], bias=bias)
    return PerHeadLinear(shape, bias)


def _activate(activation: str, z: mx.array) -> mx.array:
    if activation == "relu":
        return mx.maximum(z, 0.0)
    if activation == "signed_relu":
        return mx.concatenate([mx.maximum(z, 0.0), mx.maximum(-z, 0.0)], axis=-1)
    if activation == "signed_softmax":
        return mx.concatenate([mx.softmax(s, axis=-1, precise=True) for s in (z, -z)], axis=-1)
    return z
