"""Rotary position embedding: the frequencies of a spec, and the rotation in NumPy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from supra_core.mixers.positions import Float64, RotaryEmbedding


def inverse_frequencies(rope: RotaryEmbedding, channels: int) -> Float64:
    """Radians a position for each pair of the d ``channels`` that rotate: (d / 2,) float64.

    theta_i = base^(-2 i / d), slowed down as the spec's scaling says.
    """
    rotated = rope.rotated(channels)
    theta = rope.base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    return np.asarray(theta) if rope.scaling is None else rope.scaling.slowed(theta, rope.base)


def rotate(x: Float64, positions: npt.NDArray[np.int64], rope: RotaryEmbedding) -> Float64:
    """x (..., T, heads, channels) rotated by ``positions`` (..., T), times the magnitude."""
    rotated = rope.rotated(x.shape[-1])
    angles = positions[..., None, None] * inverse_frequencies(rope, x.shape[-1])
    cos, sin = rope.magnitude * np.cos(angles), rope.magnitude * np.sin(angles)
    out = x.copy()
    if rope.pairing == "half":
        first, second = slice(0, rotated // 2), slice(rotated // 2, rotated)
    else:
        first, second = slice(0, rotated, 2), slice(1, rotated, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out
