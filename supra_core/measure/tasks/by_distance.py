"""What a model still knows of earlier tokens: associative recall and copying, by distance.

Both follow the synthetic tasks of the literature on linear attention (arXiv 2312.04927,
2402.01032), with words instead of random symbols, so that a pretrained model need not be trained
on them. A sequence begins as the tokenizer begins a text, and is fed once; at each distance the
question is asked from a copy of the state, and the sequence goes on as if it had not been asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.measure.intervals import of_share
from supra_core.measure.probes.words import word_tokens
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Logits, check_ids
from supra_core.text import ModelTokenizer

Int64 = npt.NDArray[np.int64]

PAIRS = 8
COPIED_WORDS = 16
# Of a repeated passage the first words cannot be known and only say that it is repeated.
CUE_WORDS = 2
_BATCH = 4


@dataclass(frozen=True)
class DistanceAccuracy:
    """Accuracy at one distance: tokens from a token to the place where it has to come again.

    ``greedy``: the likeliest of all tokens is right. ``among``: the right one is the likeliest
    of the words in question, ``by_chance`` for a blind guess. Both with their 95 % intervals
    (Wilson), over ``answers`` answers.
    """

    distance: int
    greedy: float
    greedy_interval: tuple[float, float]
    among: float
    among_interval: tuple[float, float]
    by_chance: float
    answers: int


def associative_recall(
    model: Backend,
    tokenizer: ModelTokenizer,
    filler: Int64,
    *,
    distances: Sequence[int],
    sequences: int,
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "recall",
) -> list[DistanceAccuracy]:
    """Eight lines ``key: value``, text from ``filler`` (T,), then one key again: its value?

    Every line is asked equally often, at every distance, so that a model that always says the
    latest value, or the first, is right by chance alone; ``sequences`` that are no multiple of
    eight leave the rest to some of the lines. Distances that do not fit between any key and its
    repetition, or into the model's max_position_embeddings, are left out. Raises
    :class:`SupraError` for tokens of ``filler`` that the model does not have.
    """
    words, _ = word_tokens(tokenizer.raw, model.spec.vocab_size)
    colon, line = (_ids(tokenizer, text) for text in (":", "\n"))
    leading = np.array(tokenizer.leading_ids, dtype=np.int64)
    check_ids(np.concatenate([leading, filler, colon, line]), model.spec.vocab_size)
    pair = 2 + len(colon) + len(line)
    # After the asked value: its line end, the pairs after it, text, key and colon.
    fixed = len(line) + 1 + len(colon)
    generator = np.random.default_rng(seed)
    room = model.spec.max_position_embeddings - len(leading)
    kept = _fitting(distances, fixed + 1 + (PAIRS - 1) * pair, PAIRS * pair, room)
    tallies = [_Tally(distance) for distance in kept]
    order = generator.permutation(PAIRS)
    for batch, count in enumerate(_batches(sequences if kept else 0, _even(sequences))):
        progress(stage, tallies[0].answers, sequences)
        drawn = _draw(generator, words, count, 2 * PAIRS)
        keys, values = drawn[:, :PAIRS], drawn[:, PAIRS:]
        asked = int(order[batch % PAIRS])
        after = PAIRS - 1 - asked
        prefix = _behind(leading, _pairs(keys, values, colon, line))
        texts = _passages(generator, filler, count, kept[-1])
        cuts = [distance - 1 - fixed - after * pair for distance in kept]
        question = np.concatenate([keys[:, asked, None], np.tile(colon, (count, 1))], axis=1)
        for tally, logits in zip(
            tallies, _asked(model, prefix, texts, cuts, question), strict=True
        ):
            tally.add(logits[:, -1], values, np.full(count, asked))
    progress(stage, sequences, sequences)
    return [tally.result() for tally in tallies]


def copying(
    model: Backend,
    tokenizer: ModelTokenizer,
    filler: Int64,
    *,
    distances: Sequence[int],
    sequences: int,
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "copying",
) -> list[DistanceAccuracy]:
    """Sixteen random words, text from ``filler`` (T,), then the words again: each next word?

    The first two repeated words are given, and the last has no other left to be told from: each
    is looked for among those that have not been repeated yet, since a model that favours what it
    has just read would be below the chance of all sixteen. Distances as in
    :func:`associative_recall`, as is what is raised.
    """
    words, _ = word_tokens(tokenizer.raw, model.spec.vocab_size)
    leading = np.array(tokenizer.leading_ids, dtype=np.int64)
    check_ids(np.concatenate([leading, filler]), model.spec.vocab_size)
    generator = np.random.default_rng(seed)
    room = model.spec.max_position_embeddings - len(leading)
    kept = _fitting(distances, COPIED_WORDS, COPIED_WORDS, room)
    tallies = [_Tally(distance) for distance in kept]
    asked = range(CUE_WORDS, COPIED_WORDS - 1)
    for count in _batches(sequences if kept else 0, _BATCH):
        progress(stage, tallies[0].answers // len(asked), sequences)
        passage = _draw(generator, words, count, COPIED_WORDS)
        prefix = _behind(leading, passage)
        texts = _passages(generator, filler, count, kept[-1])
        cuts = [distance - COPIED_WORDS for distance in kept]
        for tally, logits in zip(tallies, _asked(model, prefix, texts, cuts, passage), strict=True):
            for place in asked:
                tally.add(logits[:, place - 1], passage[:, place:], np.zeros(count, dtype=int))
    progress(stage, sequences, sequences)
    return [tally.result() for tally in tallies]


class _Tally:
    """Counts of right answers at one distance."""

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._greedy = self._among = 0
        self._by_chance = 0.0
        self.answers = 0

    def add(self, logits: Logits, candidates: Int64, right: Int64) -> None:
        """logits (B, V); candidates (B, n) token ids; right (B,), indices into them."""
        rows = np.arange(len(right))
        self._greedy += int((logits.argmax(axis=-1) == candidates[rows, right]).sum())
        chosen = np.take_along_axis(logits, candidates, axis=-1).argmax(axis=-1)
        self._among += int((chosen == right).sum())
        self._by_chance += len(right) / candidates.shape[1]
        self.answers += len(right)

    def result(self) -> DistanceAccuracy:
        n = self.answers
        return DistanceAccuracy(
            self._distance,
            self._greedy / n,
            of_share(self._greedy, n),
            self._among / n,
            of_share(self._among, n),
            self._by_chance / n,
            n,
        )


def _asked(
    model: Backend, prefix: Int64, texts: Int64, cuts: Sequence[int], question: Int64
) -> Iterator[Logits]:
    """Logits (B, Q, V) of ``question`` (B, Q) after prefix (B, P) and texts[:, :cut], cuts rising.

    A cut of 0 asks right after the prefix.
    """
    _, state = model.prefill(prefix)
    done = 0
    for cut in cuts:
        if cut > done:
            _, state = model.prefill(texts[:, done:cut], state)
            done = cut
        logits, _ = model.prefill(question, state)
        yield logits


def _pairs(keys: Int64, values: Int64, colon: Int64, line: Int64) -> Int64:
    """(B, n) keys and values as lines ``key: value``, (B, n * tokens of a line)."""
    B = len(keys)
    columns = []
    for index in range(keys.shape[1]):
        columns += [keys[:, index, None], np.tile(colon, (B, 1))]
        columns += [values[:, index, None], np.tile(line, (B, 1))]
    return np.concatenate(columns, axis=1)


def _behind(leading: Int64, rows: Int64) -> Int64:
    """Rows (B, T) behind what the tokenizer puts in front of a text."""
    return np.concatenate([np.tile(leading, (len(rows), 1)), rows], axis=1)


def _fitting(distances: Sequence[int], least: int, around: int, room: int) -> list[int]:
    """Rising distances that a sequence with ``around`` more tokens on both sides can have."""
    most = room - 2 * around
    return sorted({distance for distance in distances if least <= distance <= most})


def _draw(generator: np.random.Generator, words: Int64, rows: int, count: int) -> Int64:
    """(rows, count) words, no word twice in a row."""
    return np.stack([generator.choice(words, count, replace=False) for _ in range(rows)])


def _passages(generator: np.random.Generator, filler: Int64, rows: int, length: int) -> Int64:
    """(rows, length) pieces of a text, each from a random place; a short text starts again."""
    text = np.resize(filler, max(len(filler), length + 1))
    starts = generator.integers(len(text) - length, size=rows)
    return np.stack([text[start : start + length] for start in starts])


def _even(sequences: int) -> int:
    """Sequences a batch, which asks one line of all its sequences, for the lines to come evenly."""
    each = max(1, sequences // PAIRS)
    return max(size for size in range(1, _BATCH + 1) if each % size == 0)


def _batches(total: int, size: int) -> Iterator[int]:
    for first in range(0, total, size):
        yield min(size, total - first)


def _ids(tokenizer: ModelTokenizer, text: str) -> Int64:
    found = tokenizer.encode(text).ids.tolist()
    if not found:
        raise SupraError(f"the tokenizer has no token for {text!r}, which the probes need")
    return np.array(found, dtype=np.int64)
