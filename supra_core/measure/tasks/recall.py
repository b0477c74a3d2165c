"""Associative recall of a value by its key, by distance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from supra_core.measure.tasks.by_distance import BATCH, Batch, DistanceTask, Material, batch_sizes

PAIRS = 8


class Recall(DistanceTask):
    """Eight lines ``key: value``, running text, then one key again: its value?

    Every line is asked equally often, at every distance, so that a model that always says the
    latest value, or the first, is right by chance alone; sequences that are not a multiple of
    eight leave the rest to some of the lines.
    """

    name = "recall"
    marks = (":", "\n")

    def span(self, material: Material) -> int:
        return PAIRS * _line(material)

    def batches(
        self, generator: np.random.Generator, material: Material, sequences: int
    ) -> Iterator[Batch]:
        order = generator.permutation(PAIRS)
        for number, count in enumerate(batch_sizes(sequences, even_size(sequences))):
            drawn = material.draw(generator, count, 2 * PAIRS)
            keys, values = drawn[:, :PAIRS], drawn[:, PAIRS:]
            colon, end = (np.tile(mark, (count, 1)) for mark in material.marks)
            lines = [
                part
                for n in range(PAIRS)
                for part in (keys[:, n, None], colon, values[:, n, None], end)
            ]
            asked = int(order[number % PAIRS])
            question = np.concatenate([keys[:, asked, None], colon], axis=1)
            answer = (-1, values, np.full(count, asked))
            # From the value: its line end, the lines after it, a key and its colon.
            taken = _line(material) * (PAIRS - asked)
            yield Batch(np.concatenate(lines, axis=1), question, taken, [answer])


def even_size(sequences: int) -> int:
    """Sequences a batch, which asks one line of all its sequences, for the lines to come evenly."""
    each = max(1, sequences // PAIRS)
    return max(size for size in range(1, BATCH + 1) if each % size == 0)


def _line(material: Material) -> int:
    """The tokens of a line."""
    return 2 + sum(map(len, material.marks))
