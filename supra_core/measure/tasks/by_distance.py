"""What a model still knows of earlier tokens, by distance, in sequences that are generated.

A distance counts tokens from a token to the place where it has to come again.

As the synthetic tasks of the literature on linear attention (arXiv 2312.04927, 2402.01032), with
words instead of random symbols, so that a pretrained model need not be trained on them. A sequence
begins as the tokenizer begins a text, and is fed once; at each distance the question is asked from
a copy of the state, and the sequence goes on as if it had not been asked.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from supra_core.errors import SupraError
from supra_core.measure.intervals import of_share
from supra_core.measure.probes.words import running_text, word_tokens
from supra_core.measure.tasks.task import Int64, Measure, Options, Record, Subject, Task
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Logits, check_ids
from supra_core.text import ModelTokenizer, read_text

BATCH = 4
_SEQUENCES = 32


@dataclass(frozen=True)
class Material:
    """What sequences are made of, in token ids, and the rising distances that fit.

    ``leading``: what the tokenizer begins a text with. ``filler`` (T,): the running text.
    ``marks``: those of :attr:`DistanceTask.marks`.
    """

    words: Int64
    leading: Int64
    filler: Int64
    marks: list[Int64]
    distances: tuple[int, ...] = ()

    def draw(self, generator: np.random.Generator, rows: int, count: int) -> Int64:
        """(rows, count) words, no word twice in a row."""
        drawn = [generator.choice(self.words, count, replace=False) for _ in range(rows)]
        return np.stack(drawn)


@dataclass(frozen=True)
class Batch:
    """Sequences up to their running text, (B, P), and what is asked after it, (B, Q).

    ``taken``: tokens of every distance that are not running text. ``answers``: each a column of
    the question, the candidates (B, n) for the token after it, and the index (B,) of the right one.
    """

    passage: Int64
    question: Int64
    taken: int
    answers: Sequence[tuple[int, Int64, Int64]]


class DistanceTask(Task):
    """``marks``: texts between the words, each of which needs a token."""

    reads = "nothing"
    marks: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def span(self, material: Material) -> int:
        """Tokens to be remembered: the shortest distance, and the room on each side of one."""

    @abstractmethod
    def batches(
        self, generator: np.random.Generator, material: Material, sequences: int
    ) -> Iterator[Batch]:
        """``sequences`` of them, drawn by the generator batch by batch."""

    def read(self, path: Path | None, limit: int | None = None) -> str:
        return running_text() if path is None else read_text(path)

    def prepared(self, content: str, subject: Subject, options: Options) -> Measure:
        filler = _ids(subject.tokenizer, content)
        material = self.material(subject.spec, subject.tokenizer, filler, options.distances)
        if not material.distances:
            raise SupraError("no distance fits into the model's positions")
        sequences = options.limit or _SEQUENCES

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            found = self.accuracies(model, material, sequences, options.seed, progress, stage)
            return {
                "metrics": {
                    f"{kind}@{one['distance']}": one[kind]
                    for kind in ("among", "greedy")
                    for one in found
                },
                "form": "recurrent",
                "sequences": sequences,
                "seed": options.seed,
                "by_chance": found[0]["by_chance"],
                "distances": found,
            }

        return measure

    def conditions(self, record: Record) -> str:
        answers = record["distances"][0]["answers"]
        return (
            f"{record['sequences']:,} sequences and {answers:,} answers at each distance in "
            f"tokens, recurrent form, seed {record['seed']}; among: of the candidates, "
            f"{record['by_chance']:.4f} by chance; greedy: of all tokens"
        )

    def material(
        self, spec: ModelSpec, tokenizer: ModelTokenizer, filler: Int64, distances: Sequence[int]
    ) -> Material:
        """Checks that the model has all tokens; distances that do not fit are omitted.

        One has to fit between a word and its repetition, and into max_position_embeddings.
        """
        words, _ = word_tokens(tokenizer.raw, spec.vocab_size)
        leading = np.array(tokenizer.leading_ids, dtype=np.int64)
        marks = [_ids(tokenizer, mark) for mark in self.marks]
        check_ids(np.concatenate([leading, filler, *marks]), spec.vocab_size)
        material = Material(words, leading, filler, marks)
        span = self.span(material)
        most = spec.max_position_embeddings - len(leading) - 2 * span
        fitting = sorted({distance for distance in distances if span <= distance <= most})
        return replace(material, distances=tuple(fitting))

    def accuracies(
        self, model: Backend, material: Material, sequences: int, seed: int = 0,
        progress: Progress = silent, stage: str = "",
    ) -> list[Record]:  # fmt: skip
        """By rising distance, each over ``sequences`` seeded sequences.

        ``greedy``: the likeliest of all tokens is right. ``among``: the right one is the likeliest
        of the words in question, ``by_chance`` for a blind guess. Both with their 95 % intervals
        (Wilson), over ``answers`` answers.
        """
        generator = np.random.default_rng(seed)
        distances, done = material.distances, 0
        # Of each distance: greedy right, right among the candidates, right by chance, answers.
        counts = np.zeros((len(distances), 4))
        for batch in self.batches(generator, material, sequences):
            progress(stage, done, sequences)
            size = len(batch.question)
            done += size
            begin = np.tile(material.leading, (size, 1))
            texts = _passages(generator, material.filler, size, distances[-1])
            _, state = model.prefill(np.concatenate([begin, batch.passage], axis=1))
            fed = 0
            for row, distance in enumerate(distances):
                cut = distance - batch.taken
                if cut > fed:
                    _, state = model.prefill(texts[:, fed:cut], state)
                    fed = cut
                logits, _ = model.prefill(batch.question, state)
                for column, candidates, right in batch.answers:
                    counts[row] += _counted(logits[:, column], candidates, right)
        progress(stage, sequences, sequences)
        pairs = zip(distances, counts.tolist(), strict=True)
        return [_accuracy(distance, *row) for distance, row in pairs]


def batch_sizes(total: int, size: int) -> Iterator[int]:
    """``total`` in batches of ``size``."""
    return (min(size, total - first) for first in range(0, total, size))


def _counted(logits: Logits, candidates: Int64, right: Int64) -> tuple[float, ...]:
    """logits (B, V); candidates (B, n) token ids; right (B,), indices into them."""
    rows = np.arange(len(right))
    greedy = (logits.argmax(axis=-1) == candidates[rows, right]).sum()
    among = (np.take_along_axis(logits, candidates, axis=-1).argmax(axis=-1) == right).sum()
    return greedy, among, len(right) / candidates.shape[1], len(right)


def _accuracy(
    distance: int, greedy: float, among: float, by_chance: float, answers: float
) -> Record:
    n = int(answers)
    return {
        "distance": distance, "greedy": greedy / n, "greedy_interval": of_share(greedy, n),
        "among": among / n, "among_interval": of_share(among, n), "by_chance": by_chance / n,
        "answers": n,
    }  # fmt: skip


def _passages(generator: np.random.Generator, filler: Int64, rows: int, length: int) -> Int64:
    """(rows, length) pieces of a text, each from a random place; a short text starts again."""
    text = np.resize(filler, max(len(filler), length + 1))
    starts = generator.integers(len(text) - length, size=rows)
    return np.stack([text[start : start + length] for start in starts])


def _ids(tokenizer: ModelTokenizer, text: str) -> Int64:
    found = tokenizer.encode(text).ids
    if not len(found):
        raise SupraError(
            f"the tokenizer has no token for the text {text!r}, and the task needs one"
        )
    return found
