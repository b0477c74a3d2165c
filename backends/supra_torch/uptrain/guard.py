"""Does a run go well: is the loss still falling, and is a step no worse than those before it?"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Steps that are averaged: single batches differ by more than diverging does at first.
_STEPS = 16
# Above this share of what stops the run, a checkpoint would no longer be a good one.
_SUSPECT = 0.6
# Steps whose gradients a spike is measured by.
_NORMS = 64


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
        return self.mean / self._lowest if self._last and self._lowest > 0 else 1.0


class StepGuard:
    """Which steps to leave out: gradients that are not finite, or far above those before them.

    ``spike``: a step is left out whose gradient norm is so many times the median of the last 64
    of the stage, once there are as many; 0 for none. ``in_a_row``: so many steps may be left out
    one after the other. ``norms``: of the steps before, None where one was left out.
    """

    def __init__(self, spike: float, in_a_row: int, norms: Iterable[float | None] = ()) -> None:
        self._spike, self._in_a_row = spike, in_a_row
        self._last: deque[float] = deque(maxlen=_NORMS)
        self._left_out = 0
        for norm in norms:
            self.add(norm)

    def most(self) -> float:
        """The largest gradient norm of a step that is taken."""
        if self._spike == 0 or len(self._last) < _NORMS:
            return math.inf
        return self._spike * statistics.median(self._last)

    def add(self, norm: float | None) -> None:
        """One more step: the norm of its gradient, None if it was left out."""
        self._left_out = self._left_out + 1 if norm is None else 0
        if norm is not None:
            self._last.append(norm)

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was left out."""
        return self._left_out > 0

    @property
    def gives_up(self) -> bool:
        """Whether too many were left out in a row."""
        return self._left_out > self._in_a_row


@dataclass(frozen=True)
class Guards:
    """Both, fed by the lines of metrics that a stage's steps leave."""

    losses: LossGuard
    steps: StepGuard

    @staticmethod
    def of(
        divergence: float, spike: float, skips: int, records: Iterable[Mapping[str, Any]]
    ) -> Guards:
        """As they are after the steps that were logged."""
        guards = Guards(LossGuard(divergence), StepGuard(spike, skips))
        for record in records:
            guards.add(record)
        return guards

    def add(self, record: Mapping[str, Any]) -> None:
        """One more step."""
        left_out = "left_out" in record
        self.steps.add(None if left_out else record["gradient_norm"])
        if not left_out:
            self.losses.add(record["loss"])

    @property
    def healthy(self) -> bool:
        """Whether the weights are worth a checkpoint."""
        return self.losses.healthy and not self.steps.in_trouble
