"""Sampling from any backend, one token at a time, in NumPy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.mixers.parts import softmax
from supra_core.runtime.backend import Backend, check_ids
from supra_core.runtime.likelihood import NoNumbers

# Tokens that the repetition penalty looks back on.
REPETITION_CONTEXT = 64

# Called with the logits (V,), after any penalty, and the token sampled from them, an end of text
# included.
OnToken = Callable[[npt.NDArray[np.float32], int], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    ``temperature`` 0 takes the likeliest; ``top_p`` keeps that much probability, ``min_p`` what
    has at least that share of the likeliest's, both before the temperature counts;
    ``repetition_penalty`` divides the logits of the last tokens (CTRL, arXiv 1909.05858), 1 being
    none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        heat, penalty = self.temperature, self.repetition_penalty
        for name, fits, allowed in (
            ("temperature", heat == 0 or 1e-3 <= heat <= 1e3, "0, or from 0.001 to 1000"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-2 <= penalty <= 1e2, "from 0.01 to 100 (1 is none)"),
            ("seed", self.seed is None or 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not fits:
                raise SupraError(f"{name} must be {allowed}, not {getattr(self, name)}")


def generate(
    model: Backend,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] | None = None,
) -> Iterator[int]:
    """New tokens after ``prompt``, until one of ``stop`` or max_tokens.

    ``stop`` None is the spec's end-of-text tokens; the stop token itself is not yielded. Raises
    :class:`SupraError` for a prompt that is empty or has a token that the model does not have.
    """
    if not len(prompt):
        raise SupraError("the prompt has no tokens: give at least one to go on from")
    ids = np.asarray(prompt, dtype=np.int64)
    check_ids(ids, model.spec.vocab_size)
    logits, state = model.prefill(ids[None])
    for token, _ in continuation(model, logits[0, -1], state, prompt, sampling, stop=stop):
        yield token


def continuation(
    model: Backend,
    logits: npt.NDArray[np.float32],
    state: Any,
    seen: Sequence[int],
    sampling: Sampling,
    *,
    stop: Collection[int] | None = None,
    on_token: OnToken | None = None,
) -> Iterator[tuple[int, Any]]:
    """As :func:`generate`, after the last ``logits`` (V,); each token with the state after it.

    ``seen``: the tokens before, as many as the repetition penalty is to know.
    """
    ends = frozenset(model.spec.eos_token_id if stop is None else stop)
    generator = np.random.default_rng(sampling.seed)
    recent = deque(seen[-REPETITION_CONTEXT:], REPETITION_CONTEXT)
    for _ in range(sampling.max_tokens):
        logits = penalised(logits, recent, sampling.repetition_penalty)
        token = sample(logits, sampling, generator)
        if on_token is not None:
            on_token(logits, token)
        if token in ends:
            return
        following, state = model.step(np.array([token]), state)
        recent.append(token)
        yield token, state
        logits = following[0]


def sample(
    logits: npt.NDArray[np.float32], sampling: Sampling, generator: np.random.Generator
) -> int:
    """One token id from logits (V,); :class:`NoNumbers` where one of them is NaN or infinite."""
    likeliest = int(logits.argmax())
    # Of numbers among which is a NaN, that is the highest.
    if not np.isfinite(logits[likeliest]):
        raise NoNumbers
    if sampling.temperature == 0:
        return likeliest
    exact = logits.astype(np.float64)
    probabilities = softmax(exact)
    order = np.argsort(-probabilities, kind="stable")
    kept = probabilities[order] >= sampling.min_p * probabilities[order[0]]
    if sampling.top_p < 1:
        kept &= np.cumsum(probabilities[order]) - probabilities[order] < sampling.top_p
    order = order[kept]
    return int(generator.choice(order, p=softmax(exact[order] / sampling.temperature)))


def penalised(
    logits: npt.NDArray[np.float32], recent: Iterable[int], penalty: float
) -> npt.NDArray[np.float32]:
    """Logits (V,) of which those of recent tokens are less likely (CTRL, arXiv 1909.05858)."""
    if penalty == 1:
        return logits
    repeated = np.unique(np.array(list(recent)))
    changed = logits.copy()
    before = logits[repeated]
    changed[repeated] = np.where(before < 0, before * penalty, before / penalty)
    return changed
