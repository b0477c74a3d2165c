"""The norms of a model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from supra_core.mixers.parts import Norm


def norm_module(norm: Norm, size: int) -> nn.Module:
    """A norm over ``size`` channels."""
    if norm.weight_offset:
        return _OffsetNorm(norm, size)
    if norm.kind == "layer_norm":
        return nn.LayerNorm(size, eps=norm.eps, bias=False)
    return nn.RMSNorm(size, eps=norm.eps)


class _OffsetNorm(nn.Module):
    """A norm whose gain is its weight plus a constant, added in float32."""

    def __init__(self, norm: Norm, size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self._spec = norm

    def __call__(self, x: mx.array) -> mx.array:
        """(..., size) -> (..., size)."""
        norm = self._spec
        gain = self.weight.astype(mx.float32) + norm.weight_offset
        exact = x.astype(mx.float32)
        if norm.kind == "layer_norm":
            return mx.fast.layer_norm(exact, gain, None, norm.eps).astype(x.dtype)
        return mx.fast.rms_norm(exact, gain, norm.eps).astype(x.dtype)
