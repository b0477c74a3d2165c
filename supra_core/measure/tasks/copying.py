"""Copying of random words, by distance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from supra_core.measure.tasks.by_distance import BATCH, Batch, DistanceTask, Material, batch_sizes

WORDS = 16
# Of a repeated passage the first words cannot be known and only say that it is repeated.
CUE_WORDS = 2


class Copying(DistanceTask):
    """Sixteen random words, running text, then the words again: each next word?

    The first two repeated words are given, and the last has no other left to be told from: each
    is looked for among those that have not been repeated yet, since a model that favours what it
    has just read would be below the chance of all sixteen.
    """

    name = "copying"

    def span(self, material: Material) -> int:
        return WORDS

    def batches(
        self, generator: np.random.Generator, material: Material, sequences: int
    ) -> Iterator[Batch]:
        for count in batch_sizes(sequences, BATCH):
            passage = material.draw(generator, count, WORDS)
            first = np.zeros(count, dtype=np.int64)
            answers = [(n - 1, passage[:, n:], first) for n in range(CUE_WORDS, WORDS - 1)]
            yield Batch(passage, passage, WORDS, answers)
