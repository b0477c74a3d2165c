"""Sampling from any backend, one token at a time, in NumPy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.backend import Backend
from supra_core.errors import SupraError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the likeliest token; ``top_p`` keeps that much probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not fits:
                raise SupraError(f"{name} must be {allowed}, not {getattr(self, name)}")


@dataclass(frozen=True)
class Memory:
    """The tokens a state has seen, and the state."""

    tokens: tuple[int, ...] = ()
    state: Any = None


def generate(
    model: Backend,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    memory: Memory | None = None,
    stop: Collection[int] | None = None,
) -> Iterator[tuple[int, Memory]]:
    """Each new token and the memory that has seen it, until one of ``stop`` or max_tokens.

    ``prompt`` goes on from ``memory``. ``stop`` None is the spec's end-of-text tokens; the stop
    token itself is not yielded.
    """
    if not len(prompt):
        raise SupraError("the prompt has no tokens: give at least one to go on from")
    memory = memory or Memory()
    ends = frozenset(model.spec.eos_token_id if stop is None else stop)
    generator = np.random.default_rng(sampling.seed)
    logits, state = model.prefill(np.asarray(prompt, dtype=np.int64)[None], memory.state)
    seen = (*memory.tokens, *(int(token) for token in prompt))
    last = logits[0, -1]
    for _ in range(sampling.max_tokens):
        token = sample(last, sampling, generator)
        if token in ends:
            return
        logits, state = model.step(np.array([token]), state)
        seen = (*seen, token)
        yield token, Memory(seen, state)
        last = logits[0]


def sample(
    logits: npt.NDArray[np.float32], sampling: Sampling, generator: np.random.Generator
) -> int:
    """One token id from logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    if sampling.top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        order = order[before < sampling.top_p]
    kept = probabilities[order]
    return int(generator.choice(order, p=kept / kept.sum()))
