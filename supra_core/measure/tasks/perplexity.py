"""Perplexity of a text file, with every convention stated beside the number.

Perplexity depends on how the text was prepared, on the length and stride of the windows and on
whether a BOS token stands before them, so that all of it is part of the record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from supra_core.errors import SupraError
from supra_core.measure.perplexity import token_scores
from supra_core.measure.tasks.task import Int64, Measure, Options, Record, Subject, Task
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form, check_ids
from supra_core.text import EncodedText, read_text

_TEXT_FORM = "as it stands in the file, UTF-8"


class TextTask(Task):
    """A task over a text file."""

    reads = "text"

    def read(self, path: Path | None, limit: int | None = None) -> str:
        """The whole text: the limit counts tokens."""
        assert path is not None
        return read_text(path)


class Perplexity(TextTask):
    """See :func:`perplexity`."""

    name = "perplexity"

    def prepared(self, content: str, subject: Subject, options: Options) -> Measure:
        text, alike = subject.encoded(content, options.limit)
        if len(text.ids) < 2:
            raise SupraError("perplexity needs a text of at least 2 tokens: choose a longer one")
        check_ids(text.ids, subject.spec.vocab_size)
        length, positions = options.length, subject.spec.max_position_embeddings
        notes: Record = {} if alike else {"same_tokens": False}
        if subject.spec.is_transformer and min(length, len(text.ids)) > positions:
            notes["beyond_positions"] = positions

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            batch, form = options.batch, subject.form
            found = perplexity(
                model, text, length, batch, form=form, progress=progress, stage=stage
            )
            return found | notes

        return measure

    def conditions(self, record: Record) -> str:
        return (
            f"{record['tokens']:,} tokens in windows of {record['length']}, stride "
            f"{record['stride']}, {record['form']} form; text {record['text_form']}"
        )


def perplexity(
    model: Backend, text: EncodedText, length: int = 512, batch: int = 4, *,
    form: Form = "parallel", progress: Progress = silent, stage: str = "perplexity",
) -> Record:  # fmt: skip
    """Perplexity over consecutive windows of ``length`` tokens that do not overlap.

    The last window may be shorter; before each stands what the text ``begins`` with. Each predicts
    all its tokens but the first: ``tokens`` counts them, ``text_bytes`` their UTF-8 bytes.
    """
    total = len(text.ids)
    nats, predicted, text_bytes = 0.0, 0, 0
    progress(stage, 0, total)
    for start, ids in _batches(text.ids, length, batch):
        before = np.tile(np.array(text.begins, dtype=np.int64), (len(ids), 1))
        whole = np.concatenate([before, ids], axis=1)
        losses = token_scores(model, whole, form)[0][:, len(text.begins) :]
        nats += float(losses.sum(dtype=np.float64))
        predicted += losses.size
        for row in range(len(ids)):
            first = start + row * ids.shape[1]
            text_bytes += text.byte_count(first + 1, first + ids.shape[1])
        seen = min(start + ids.size, total)
        progress(stage, seen, total, perplexity=_exp(nats / predicted))
    return {
        "metrics": {
            "perplexity": _exp(nats / predicted),
            "bits_per_byte": nats / math.log(2) / text_bytes if text_bytes else math.nan,
            "nats_per_token": nats / predicted,
        },
        "tokens": predicted,
        "text_bytes": text_bytes,
        "length": length,
        "stride": length,
        "text_form": f"{_TEXT_FORM}, {text.form}",
    }


def _batches(ids: Int64, length: int, batch: int) -> Iterator[tuple[int, Int64]]:
    """(start, windows (B, length)), then the shorter rest if it has something to predict."""
    whole = len(ids) // length
    for first in range(0, whole, batch):
        count = min(batch, whole - first)
        start = first * length
        yield start, ids[start : start + count * length].reshape(count, length)
    rest = ids[whole * length :]
    if len(rest) > 1:
        yield whole * length, rest[None]


def _exp(nats: float) -> float:
    # exp overflows a float above 709 nats; such a model is no better than infinity.
    return math.exp(nats) if nats < 700 else math.inf
