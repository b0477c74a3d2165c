"""How likely tokens were, and which were likeliest in their places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError

Logits = npt.NDArray[np.float32]


class NoNumbers(SupraError):
    """A model computed logits that no token can be chosen by."""

    def __init__(self) -> None:
        super().__init__(
            "the model computes numbers that are not finite (NaN or infinity) for this text, so no "
            "token can be chosen: check its weights, or use a type with more range"
        )


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A token and its log-probability in nats: None for a text's first, which nothing predicts.

    ``top``: the likeliest tokens in its place with theirs, the likeliest first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def likelihoods(logits: Logits, tokens: Sequence[int], top: int) -> list[Likelihood]:
    """How likely ``tokens`` (T,) were by ``logits`` (T, V), each with the ``top`` likeliest."""
    return [likelihood(row, token, top) for row, token in zip(logits, tokens, strict=True)]


def likelihood(logits: Logits, token: int, top: int) -> Likelihood:
    """How likely ``token`` was by ``logits`` (V,); SupraError where they are no numbers."""
    highest = logits.max()
    if not math.isfinite(highest):
        raise NoNumbers
    total = float(highest) + math.log(np.exp(logits - highest).sum(dtype=np.float64))
    return Likelihood(
        int(token),
        float(logits[token]) - total,
        tuple((int(index), float(logits[index]) - total) for index in _highest(logits, top)),
    )


def _highest(logits: Logits, count: int) -> npt.NDArray[np.intp]:
    """Indices of the highest ``count``, the highest first; of equal ones the first."""
    if count == 1:
        return np.array([logits.argmax()])
    if count >= len(logits):
        found = np.arange(len(logits))
    else:
        found = np.sort(np.argpartition(-logits, count)[:count])
    return found[np.argsort(-logits[found], kind="stable")]
