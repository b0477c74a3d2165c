"""Rotary position embedding: the frequencies of a spec, and the rotation in NumPy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from supra_core.spec import LinearScaling, Llama3Scaling, RotaryEmbedding

Float64 = npt.NDArray[np.float64]


def inverse_frequencies(rope: RotaryEmbedding, channels: int) -> Float64:
    """Radians a position for each pair of ``channels``: (channels / 2,) float64.

    theta_i = base^(-2 i / channels), then the spec's scaling. Llama 3's scaling divides slow
    frequencies by ``factor``, keeps fast ones and blends between (transformers,
    ``_compute_llama3_parameters``).
    """
    theta = rope.base ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)
    if isinstance(rope.scaling, LinearScaling):
        return np.asarray(theta / rope.scaling.factor)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(theta, rope.scaling)
    return np.asarray(theta)


def rotate(x: Float64, positions: npt.NDArray[np.int64], rope: RotaryEmbedding) -> Float64:
    """x (..., T, heads, channels) rotated by ``positions`` (..., T)."""
    channels = x.shape[-1]
    angles = positions[..., None, None] * inverse_frequencies(rope, channels)
    cos, sin = np.cos(angles), np.sin(angles)
    out = np.empty_like(x)
    if rope.pairing == "half":
        first, second = slice(0, channels // 2), slice(channels // 2, None)
    else:
        first, second = slice(0, None, 2), slice(1, None, 2)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def _llama3(theta: Float64, scaling: Llama3Scaling) -> Float64:
    wavelength = 2 * math.pi / theta
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return np.asarray((1 - smooth) * theta / scaling.factor + smooth * theta)
