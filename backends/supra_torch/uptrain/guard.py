"""Is the loss still falling, or has a run begun to diverge?"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

# Steps that are averaged: single batches differ by more than diverging does at first.
_STEPS = 16
# Above this share of what stops the run, a checkpoint would no longer be a good one.
_SUSPECT = 0.6


class LossGuard:
    """Compares the mean loss of the last steps with the lowest such mean of the stage.

    ``factor``: how many times it a stage may reach before it counts as diverged.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self._last: deque[float] = deque(maxlen=_STEPS)
        self._lowest = math.inf
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Take the loss of one more step into account."""
        self._last.append(loss)
        if len(self._last) == _STEPS:
            self._lowest = min(self._lowest, self.mean)

    @property
    def mean(self) -> float:
        """Of the last steps."""
        return math.fsum(self._last) / len(self._last)

    @property
    def lowest(self) -> float:
        """The lowest mean so far; infinite in the first steps."""
        return self._lowest

    @property
    def diverged(self) -> bool:
        """Whether to stop."""
        return self._ratio() > self.factor

    @property
    def healthy(self) -> bool:
        """Whether the weights are worth a checkpoint."""
        return self._ratio() <= max(1.0, _SUSPECT * self.factor)

    def _ratio(self) -> float:
        # A loss of zero has nothing to grow from.
        return self.mean / self._lowest if self._lowest > 0 else 1.0
