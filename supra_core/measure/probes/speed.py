"""Prefill and decode speed of a loaded model, through the backend protocol alone."""

from __future__ import annotations

import statistics
import time

import numpy as np

from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend


def speed(
    model: Backend, context: int, *, repeats: int = 3, steps: int = 16, seed: int = 0,
    progress: Progress = silent, stage: str = "speed",
) -> dict[str, float]:  # fmt: skip
    """Tokens a second of one sequence of random tokens, from the median of the repetitions.

    ``prefill``: ``context`` tokens at once, the logits of all of them included. ``decode``: one
    token a step after ``context`` tokens. ``*_slowest`` and ``*_fastest`` bound what was seen. The
    first prefill and the first step are not counted.
    """
    ids = np.random.default_rng(seed).integers(model.spec.vocab_size, size=(1, context))
    _, state = model.prefill(ids)
    prefills, decodes = [], []
    for done in range(repeats):
        progress(stage, done, repeats)
        start = time.perf_counter()
        _, state = model.prefill(ids)
        prefills.append(time.perf_counter() - start)
    _, state = model.step(ids[:, 0], state)
    for _ in range(steps):
        start = time.perf_counter()
        _, state = model.step(ids[:, 0], state)
        decodes.append(time.perf_counter() - start)
    progress(stage, repeats, repeats)
    return {
        "context": context, **_rates("prefill", context, prefills), **_rates("decode", 1, decodes),
        "repeats": repeats, "steps": steps,
    }  # fmt: skip


def _rates(name: str, tokens: int, seconds: list[float]) -> dict[str, float]:
    return {
        name: tokens / statistics.median(seconds),
        f"{name}_slowest": tokens / max(seconds),
        f"{name}_fastest": tokens / min(seconds),
    }
