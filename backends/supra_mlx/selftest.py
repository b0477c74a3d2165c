"""Whether the Metal kernel computes what the operations it replaces do, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from supra_mlx.metal import metal_recurrence
from supra_mlx.ops import written_state

# Layers of SmolLM2-135M, Mistral-7B and Llama-2-7B with two features a channel, and odd ones:
# heads, key/value heads, features, value channels with their sum.
SHAPES = ((9, 3, 128, 65), (32, 8, 256, 129), (32, 32, 256, 129), (6, 2, 5, 3), (4, 1, 17, 33))
_REPEATS = 50
# Of the largest output: a sum over the features, in another order.
_ROUNDINGS = 2.0**-24


@dataclass(frozen=True)
class Comparison:
    """One shape: the largest difference over the largest output, and seconds a step."""

    shape: tuple[int, ...]
    difference: float
    tolerance: float
    kernel_seconds: float
    ops_seconds: float

    @property
    def passed(self) -> bool:
        """Whether they agree."""
        return self.difference <= self.tolerance


def compare_metal() -> list[Comparison]:
    """The kernel beside the operations at every shape, on the default device.

    There has to be Metal: :func:`~supra_mlx.metal.metal_available`.
    """
    return [_compared(*shape) for shape in SHAPES]


def as_records(comparisons: list[Comparison]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) | {"passed": one.passed} for one in comparisons]


def _compared(H: int, K: int, Dk: int, Dv: int) -> Comparison:
    mx.random.seed(0)
    q, k, v = (
        mx.random.uniform(shape=(1, 1, heads, channels))
        for heads, channels in ((H, Dk), (K, Dk), (K, Dv))
    )
    decay, state = mx.random.uniform(0.5, 1, (H,)), mx.random.uniform(shape=(1, H, Dk, Dv))
    mx.eval(q, k, v, decay, state)

    def kernel() -> tuple[mx.array, mx.array]:
        return metal_recurrence(q, k, v, decay, state)

    def ops() -> tuple[mx.array, mx.array]:
        return _by_ops(q, k, v, decay, state)

    pairs = zip(kernel(), ops(), strict=True)
    difference = max(float(mx.abs(a - b).max() / mx.abs(b).max()) for a, b in pairs)
    return Comparison(
        (H, K, Dk, Dv), difference, _ROUNDINGS * (Dk + 4), _seconds(kernel), _seconds(ops)
    )


def _by_ops(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """A step as :mod:`supra_mlx.ops` takes it without the kernel."""
    B, _, H, Dk = q.shape
    K, Dv = v.shape[2:]
    heads = (B, K, H // K)
    after = written_state(
        state.reshape(*heads, Dk, Dv),
        decay.reshape(1, *heads[1:], 1, 1),
        k.reshape(B, K, 1, Dk, 1),
        v.reshape(B, K, 1, 1, Dv),
    )
    out = q.reshape(*heads, 1, Dk) @ after
    return out.reshape(B, 1, H, Dv), after.reshape(state.shape)


def _seconds(step: Callable[[], tuple[mx.array, mx.array]]) -> float:
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        mx.eval(*step())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
