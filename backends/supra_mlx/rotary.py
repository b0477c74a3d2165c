"""Rotary position embedding at any position, exact to float32.

A recurrent model has no longest context, and position times frequency in float32 is wrong by
position * 6e-8 radians. The phase is counted in 2^-64 turns instead: unsigned multiplication
wraps around exactly where the angle does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from supra_core.mixers.positions import RotaryEmbedding
from supra_core.mixers.rotary import inverse_frequencies

Rotate = Callable[[mx.array], mx.array]

_RADIANS = 2 * math.pi / 2**32


def unrotated(x: mx.array) -> mx.array:
    """x as it is, for layers without positions."""
    return x


class Rotary:
    """The rotation of a spec; each number of channels has its frequencies, computed once."""

    def __init__(self, rope: RotaryEmbedding) -> None:
        self._rope = rope
        self._turns: dict[int, mx.array] = {}

    def at(self, positions: mx.array) -> Rotate:
        """The rotation by integer positions (B, T), for x (B, T, heads, channels).

        Sines and cosines are shared by all layers that use the returned function.
        """
        tables: dict[int, tuple[mx.array, mx.array]] = {}
        wrapped = positions.astype(mx.uint64)[..., None]

        def rotate(x: mx.array) -> mx.array:
            channels = x.shape[-1]
            rotated = self._rope.rotated(channels)
            if channels not in tables:
                phase = ((wrapped * self._frequencies(channels)) >> 32).astype(mx.uint32)
                angle = phase.view(mx.int32).astype(mx.float32) * _RADIANS
                cos, sin = (self._rope.magnitude * f(angle)[:, :, None] for f in (mx.cos, mx.sin))
                tables[channels] = self._paired(cos, cos), self._paired(-sin, sin)
            turning = x[..., :rotated]
            first, second = self._pairs(turning)
            turned = _turned(turning, self._paired(second, first), *tables[channels])
            if rotated == channels:
                return turned
            return mx.concatenate([turned, x[..., rotated:]], axis=-1)

        return rotate

    def _frequencies(self, channels: int) -> mx.array:
        """(d / 2,) uint64, d of the channels rotating: 2^-64 turns a position."""
        if channels not in self._turns:
            turns = inverse_frequencies(self._rope, channels) / (2 * math.pi)
            counts = [round(float(turn) % 1.0 * 2**64) % 2**64 for turn in turns]
            self._turns[channels] = mx.array(np.array(counts, dtype=np.uint64))
        return self._turns[channels]

    def _pairs(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Both members of each pair of channels."""
        if self._rope.pairing == "half":
            half = x.shape[-1] // 2
            return x[..., :half], x[..., half:]
        return x[..., 0::2], x[..., 1::2]

    def _paired(self, first: mx.array, second: mx.array) -> mx.array:
        """The inverse of :meth:`_pairs`."""
        if self._rope.pairing == "half":
            return mx.concatenate([first, second], axis=-1)
        return mx.stack([first, second], axis=-1).flatten(-2)


@mx.compile
def _turned(x: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Each pair (a, b) -> (a cos - b sin, b cos + a sin), in x's type."""
    return (x * cos + swapped * sin).astype(x.dtype)
