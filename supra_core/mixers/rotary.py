"""Rotary position embedding: the frequencies of a spec, and the rotation in NumPy."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from supra_core.mixers.positions import (
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RotaryEmbedding,
    YarnScaling,
)

Float64 = npt.NDArray[np.float64]


def inverse_frequencies(rope: RotaryEmbedding, channels: int) -> Float64:
    """Radians a position for each pair of the d ``channels`` that rotate: (d / 2,) float64.

    theta_i = base^(-2 i / d), then the spec's scaling. Llama 3's scaling divides slow
    frequencies by ``factor``, keeps fast ones and blends between; YaRN's does so by the number of
    a pair, and LongRoPE's divides each pair's frequency by a factor of its own (transformers,
    ``modeling_rope_utils``).
    """
    rotated = rope.rotated(channels)
    theta = rope.base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    if isinstance(rope.scaling, LinearScaling):
        return np.asarray(theta / rope.scaling.factor)
    if isinstance(rope.scaling, Llama3Scaling):
        return _llama3(theta, rope.scaling)
    if isinstance(rope.scaling, YarnScaling):
        return _yarn(theta, rope.scaling, rope.base)
    if isinstance(rope.scaling, LongropeScaling):
        return np.asarray(theta / np.array(rope.scaling.chosen))
    return np.asarray(theta)


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


def _llama3(theta: Float64, scaling: Llama3Scaling) -> Float64:
    wavelength = 2 * math.pi / theta
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return np.asarray((1 - smooth) * theta / scaling.factor + smooth * theta)


def _yarn(theta: Float64, scaling: YarnScaling, base: float) -> Float64:
    pairs = len(theta)
    length = scaling.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(length / (times * 2 * math.pi)) / math.log(base)

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    # As transformers has it, so that nothing is divided by 0.
    width = 0.001 if low == high else high - low
    slowed = np.clip((np.arange(pairs) - low) / width, 0.0, 1.0)
    return np.asarray(slowed * theta / scaling.factor + (1 - slowed) * theta)
