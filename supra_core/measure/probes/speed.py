"""Prefill and decode speed of a loaded model, through the backend protocol alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one sequence, each from the median of its repetitions.

    ``prefill``: ``context`` tokens at once, the logits of all of them included. ``decode``: one
    token a step after ``context`` tokens. ``*_slowest`` and ``*_fastest`` bound what was seen.
    """

    context: int
    prefill: float
    prefill_slowest: float
    prefill_fastest: float
    decode: float
    decode_slowest: float
    decode_fastest: float
    repeats: int
    steps: int


def speed(
    model: Backend,
    context: int,
    *,
    repeats: int = 3,
    steps: int = 16,
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "speed",
) -> Speed:
    """Times on random tokens; the first prefill and the first step are not counted."""
    ids = np.random.default_rng(seed).integers(model.spec.vocab_size, size=(1, context))
    model.prefill(ids)
    prefills = []
    for done in range(repeats):
        progress(stage, done, repeats)
        start = time.perf_counter()
        _, state = model.prefill(ids)
        prefills.append(time.perf_counter() - start)
    token = ids[:, 0]
    _, state = model.step(token, state)
    decodes = []
    for _ in range(steps):
        start = time.perf_counter()
        _, state = model.step(token, state)
        decodes.append(time.perf_counter() - start)
    progress(stage, repeats, repeats)
    return Speed(
        context,
        context / statistics.median(prefills), context / max(prefills), context / min(prefills),
        1 / statistics.median(decodes), 1 / max(decodes), 1 / min(decodes),
        repeats, steps,
    )  # fmt: skip
