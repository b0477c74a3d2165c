"""Perplexity of a text, with every convention stated beside the number.

Perplexity depends on how the text was prepared, on the length and stride of the windows and on
whether a BOS token stands before them, so that all of it is part of the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form, Ids, Logits, check_ids
from supra_core.text import EncodedText

TEXT_FORM = "as it stands in the file, UTF-8"

DEFAULT_LENGTH = 512
DEFAULT_BATCH = 4
# What models that are compared compute in: a type as stored would count as part of the conversion.
DTYPE = "float32"


Losses = npt.NDArray[np.float32]
Greedy = npt.NDArray[np.bool_]


class TokenScores(Protocol):
    """What a backend may offer besides the protocol: scores without keeping the logits."""

    def token_scores(self, ids: Ids, *, form: Form = "parallel") -> tuple[Losses, Greedy]:
        """-log p of ids[:, 1:] in nats and whether each is the likeliest, both (B, T - 1)."""
        ...


@dataclass(frozen=True)
class Perplexity:
    """The result on one text.

    Windows of ``length`` tokens, one every ``stride`` tokens; each predicts all its tokens but
    the first. ``tokens`` counts what was predicted, ``text_bytes`` their UTF-8 bytes.
    """

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    text_bytes: int
    length: int
    stride: int
    text_form: str


def perplexity(
    model: Backend,
    text: EncodedText,
    *,
    length: int = DEFAULT_LENGTH,
    batch: int = DEFAULT_BATCH,
    form: Form = "parallel",
    progress: Progress = silent,
    stage: str = "perplexity",
) -> Perplexity:
    """Perplexity over consecutive windows of ``length`` tokens that do not overlap.

    The last window may be shorter; before each stands what the text ``begins`` with. Raises
    :class:`SupraError` as :func:`check_text` does.
    """
    if length < 2:
        raise SupraError(f"length must be at least 2 tokens, not {length}")
    check_text(text, model.spec.vocab_size)
    total = len(text.ids)
    nats, predicted, text_bytes = 0.0, 0, 0
    progress(stage, 0, total)
    for start, ids in _batches(text.ids, length, batch):
        losses = token_scores(model, _begun(text.begins, ids), form)[0][:, len(text.begins) :]
        nats += float(losses.sum(dtype=np.float64))
        predicted += losses.size
        for row in range(len(ids)):
            first = start + row * ids.shape[1]
            text_bytes += text.byte_count(first + 1, first + ids.shape[1])
        seen = min(start + ids.size, total)
        progress(stage, seen, total, perplexity=_exp(nats / predicted))
    mean = nats / predicted
    return Perplexity(
        perplexity=_exp(mean),
        nats_per_token=mean,
        bits_per_byte=nats / math.log(2) / text_bytes if text_bytes else math.nan,
        tokens=predicted,
        text_bytes=text_bytes,
        length=length,
        stride=length,
        text_form=f"{TEXT_FORM}, {text.form}",
    )


def check_text(text: EncodedText, vocab_size: int) -> None:
    """Raise :class:`SupraError` for fewer than two tokens, or one that the model does not have."""
    if len(text.ids) < 2:
        raise SupraError("perplexity needs a text of at least 2 tokens: choose a longer one")
    check_ids(text.ids, vocab_size)


def beyond_positions(spec: ModelSpec, tokens: int) -> dict[str, int]:
    """For a result: a transformer's positions, where a window of ``tokens`` is longer."""
    positions = spec.max_position_embeddings
    return {"beyond_positions": positions} if spec.is_transformer and tokens > positions else {}


def token_scores(model: Backend, ids: Ids, form: Form = "parallel") -> tuple[Losses, Greedy]:
    """-log p of each token after the first in nats, and whether it is the likeliest.

    ids (B, T) -> two arrays (B, T - 1).
    """
    if hasattr(model, "token_scores"):
        return cast(TokenScores, model).token_scores(ids, form=form)
    logits = model.logits(ids, form=form)
    return losses_of(logits, ids), logits[:, :-1].argmax(axis=-1) == ids[:, 1:]


def losses_of(logits: Logits, ids: Ids) -> npt.NDArray[np.float32]:
    """Cross entropy in nats of ids[:, 1:] (B, T - 1) under logits (B, T, V)."""
    predicted: npt.NDArray[Any] = logits[:, :-1]
    top = predicted.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(predicted - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(predicted, ids[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(log_sum - chosen, dtype=np.float32)


def _batches(
    ids: npt.NDArray[np.int64], length: int, batch: int
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """(start, windows (B, length)), then the shorter rest if it has something to predict."""
    whole = len(ids) // length
    for first in range(0, whole, batch):
        count = min(batch, whole - first)
        start = first * length
        yield start, ids[start : start + count * length].reshape(count, length)
    rest = ids[whole * length :]
    if len(rest) > 1:
        yield whole * length, rest[None]


def _begun(begins: tuple[int, ...], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Windows (B, T) behind the tokens that each begins with."""
    before = np.broadcast_to(np.array(begins, dtype=np.int64), (len(ids), len(begins)))
    return np.concatenate([before, ids], axis=1)


def _exp(nats: float) -> float:
    # exp overflows a float above 709 nats; such a model is no better than infinity.
    return math.exp(nats) if nats < 700 else math.inf
