"""Perplexity by position: whether more context helps, also beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.measure.intervals import around
from supra_core.measure.perplexity import losses_of
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Ids, check_ids

# Tokens a call: the logits of one piece are the largest array there is.
PIECE = 1024
FIRST_EDGE = 64


@dataclass(frozen=True)
class PositionBin:
    """Perplexity of the tokens at positions ``first`` to ``stop`` - 1, the first token being 0.

    ``low`` and ``high``: 95 %, from the standard error of the mean loss over ``tokens`` tokens.
    """

    first: int
    stop: int
    perplexity: float
    low: float
    high: float
    tokens: int


def bin_edges(length: int) -> list[int]:
    """1, then 64 and its doubles up to ``length``: positions are halved each time."""
    edges = [1]
    step = FIRST_EDGE
    while step < length:
        edges.append(step)
        step *= 2
    return [*edges, length]


def by_position(
    model: Backend,
    ids: Ids,
    *,
    piece: int = PIECE,
    progress: Progress = silent,
    stage: str = "positions",
) -> list[PositionBin]:
    """Perplexity in the bins of :func:`bin_edges` over sequences ids (N, T), N >= 1, T >= 2.

    Each sequence is fed from its beginning, ``piece`` tokens a call, through the model's state.
    """
    check_ids(ids, model.spec.vocab_size)
    losses = []
    for row in range(len(ids)):
        progress(stage, row, len(ids))
        losses.append(np.concatenate(list(_losses(model, ids[row : row + 1], piece))))
    progress(stage, len(ids), len(ids))
    table = np.stack(losses).astype(np.float64)
    # Column t of the losses is about token t + 1.
    return [
        _bin(first, stop, table[:, first - 1 : stop - 1])
        for first, stop in pairwise(bin_edges(ids.shape[1]))
    ]


def _losses(model: Backend, row: Ids, piece: int) -> Iterator[npt.NDArray[np.float32]]:
    """Nats of row[:, 1:] piece by piece; row (1, T)."""
    state: Any = None
    last = None
    for start in range(0, row.shape[1], piece):
        part = row[:, start : start + piece]
        logits, state = model.prefill(part, state)
        if last is not None:
            # The token before this piece predicts its first one.
            logits, part = (
                np.concatenate([last, logits], axis=1),
                row[:, start - 1 : start + piece],
            )
        yield losses_of(logits, part)[0]
        last = logits[:, -1:]


def _bin(first: int, stop: int, losses: npt.NDArray[np.float64]) -> PositionBin:
    mean = float(losses.mean())
    error = float(losses.std(ddof=1) / math.sqrt(losses.size)) if losses.size > 1 else 0.0
    low, high = around(mean, error)
    perplexity, least, most = (math.exp(min(x, 700.0)) for x in (mean, low, high))
    return PositionBin(first, stop, perplexity, least, most, losses.size)
