"""Perplexity by position: whether more context helps, also beyond the trained length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.measure.intervals import around
from supra_core.measure.perplexity import losses_of
from supra_core.measure.tasks.perplexity import TextTask
from supra_core.measure.tasks.task import Measure, Options, Record, Subject
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Ids, check_ids

# Tokens a call: the logits of one piece are the largest array there is.
_PIECE = 1024
_FIRST_EDGE = 64
# Sequences of one length are enough up to here; longer ones have curves of their own.
_SHORT, _SHORTEST = 2_048, 16


class Positions(TextTask):
    """A curve for each of :func:`position_lengths`; a teacher's ends at its positions."""

    name = "positions"

    def prepared(self, content: str, subject: Subject, options: Options) -> Measure:
        ids = subject.tokenizer.encode(content).ids[: options.limit]
        lengths = position_lengths(len(ids), options.longest)
        if not lengths:
            raise SupraError(
                f"positions need a text of at least {_SHORTEST} tokens: choose a longer one"
            )
        check_ids(ids, subject.spec.vocab_size)
        most = None if subject.beside is None else subject.spec.max_position_embeddings

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            curves = []
            for length in lengths:
                rows = subject.tokenizer.rows(ids, length)[:, :most]
                bins = by_position(model, rows, progress=progress, stage=f"{stage} to {length}")
                curves.append(
                    {
                        "length": length, "measured_length": rows.shape[1], "sequences": len(rows),
                        "bins": bins,
                    }
                )  # fmt: skip
            # Those of the longest sequences.
            metrics = {
                f"perplexity@{one['first']}-{one['stop'] - 1}": one["perplexity"] for one in bins
            }
            return {"metrics": metrics, "form": "recurrent", "curves": curves}

        return measure

    def conditions(self, record: Record) -> str:
        longest = record["curves"][-1]
        tokens, count = longest["measured_length"], longest["sequences"]
        return f"sequences of {tokens:,} tokens ({count:,} of them), recurrent form"


def position_lengths(tokens: int, longest: int) -> list[int]:
    """The lengths to measure: a short one, and the longest power of two that the text fills."""
    if tokens < _SHORTEST:
        return []
    most = min(2 ** int(math.log2(tokens)), longest)
    return sorted({min(_SHORT, most), most})


def bin_edges(length: int) -> list[int]:
    """1, then 64 and its doubles up to ``length``: positions are halved each time."""
    edges, step = [1], _FIRST_EDGE
    while step < length:
        edges.append(step)
        step *= 2
    return [*edges, length]


def by_position(
    model: Backend, ids: Ids, *, piece: int = _PIECE, progress: Progress = silent,
    stage: str = "positions",
) -> list[Record]:  # fmt: skip
    """Perplexity in the bins of :func:`bin_edges` over sequences ids (N, T), N >= 1, T >= 2.

    Each sequence is fed from its beginning, ``piece`` tokens a call, through the model's state.
    A bin has the tokens at positions ``first`` to ``stop`` - 1, the first token being 0. ``low``
    and ``high``: 95 %, from the standard error of the mean loss over ``tokens`` tokens.
    """
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
            logits = np.concatenate([last, logits], axis=1)
            part = row[:, start - 1 : start + piece]
        yield losses_of(logits, part)[0]
        last = logits[:, -1:]


def _bin(first: int, stop: int, losses: npt.NDArray[np.float64]) -> Record:
    mean = float(losses.mean())
    error = float(losses.std(ddof=1) / math.sqrt(losses.size)) if losses.size > 1 else 0.0
    perplexity, low, high = (math.exp(min(nats, 700.0)) for nats in (mean, *around(mean, error)))
    return {
        "first": first, "stop": stop, "perplexity": perplexity, "low": low, "high": high,
        "tokens": losses.size,
    }  # fmt: skip
