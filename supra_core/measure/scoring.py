"""Log-likelihoods of continuations, in batches, through any backend.

Rows are padded on the right: the models are causal, so that padding changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.measure.perplexity import token_scores
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form, check_ids
from supra_core.text import ModelTokenizer

# Tokens computed together, padding included.
DEFAULT_BATCH_TOKENS = 2048
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """A context's token ids and those of its continuation, which alone is scored."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class Score:
    """log p(continuation | context) in nats, and whether greedy decoding would produce it."""

    log_likelihood: float
    greedy: bool


def encode_pair(tokenizer: ModelTokenizer, context: str, continuation: str) -> Pair:
    """Both texts tokenised as one, as the lm-eval harness does it.

    White space at the end of the context goes to the continuation, and the whole is cut where the
    context alone ends, so that a token over the border belongs to the continuation. The context
    begins as the tokenizer begins a text (:attr:`ModelTokenizer.leading_ids`). Raises
    :class:`SupraError` when either has no token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode_prompt(stripped + continuation)
    border = len(tokenizer.encode_prompt(stripped))
    if not 0 < border < len(whole):
        raise SupraError(
            f"context '{context[:40]}' with continuation '{continuation[:40]}' cannot be scored: "
            "both need at least one token"
        )
    return Pair(tuple(whole[:border]), tuple(whole[border:]))


def score(
    model: Backend,
    pairs: Sequence[Pair],
    *,
    form: Form = "parallel",
    max_length: int = 2048,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress = silent,
    stage: str = "scores",
) -> list[Score]:
    """The score of every pair, in their order; raises as :func:`check_pairs` does."""
    rows = check_pairs(pairs, model.spec.vocab_size, max_length)
    scores: list[Score | None] = [None] * len(rows)
    done = 0
    for batch in like_lengths([len(row) for row in rows], batch_tokens):
        ids = padded([rows[index] for index in batch])
        losses, greedy = token_scores(model, ids, form)
        for place, index in enumerate(batch):
            # Column t of the scores is about token t + 1.
            end = len(rows[index]) - 1
            ours = slice(end - len(pairs[index].continuation), end)
            scores[index] = Score(
                log_likelihood=-float(losses[place, ours].sum(dtype=np.float64)),
                greedy=bool(greedy[place, ours].all()),
            )
        done += len(batch)
        progress(stage, done, len(rows))
    return [found for found in scores if found is not None]


def check_pairs(pairs: Sequence[Pair], vocab_size: int, max_length: int) -> list[Int64]:
    """The token ids (T,) that a model gets of each pair.

    A pair of more than ``max_length`` tokens loses the first of its context. Raises
    :class:`SupraError` when a continuation alone is longer than that, when a context or a
    continuation has no token, and for a token that the model does not have.
    """
    rows = [_row(pair, max_length) for pair in pairs]
    for row in rows:
        check_ids(row, vocab_size)
    return rows


def _row(pair: Pair, max_length: int) -> Int64:
    """The ids that the model gets; one token at least stands before the continuation."""
    if not pair.context or not pair.continuation:
        empty = "continuation" if pair.context else "context"
        raise SupraError(f"a {empty} without a token cannot be scored: give it at least one")
    if len(pair.continuation) >= max_length:
        raise SupraError(
            f"a continuation of {len(pair.continuation)} tokens does not fit into {max_length}: "
            "remove it, or use a model with more positions"
        )
    return np.array((pair.context + pair.continuation)[-max_length:], dtype=np.int64)


def like_lengths(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of indices of rows of like length, each of about ``batch_tokens`` with its padding.

    The longest come first: what fits then fits ever after.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int] | Int64]) -> Int64:
    """Rows of ids as one array (B, T), zeros to the right."""
    ids = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return ids
