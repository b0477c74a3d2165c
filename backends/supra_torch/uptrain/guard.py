"""Whether a run goes well: the loss still falls, and no step is far worse than those before."""

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

    ``lowest`` is infinite in the first steps. ``factor``: a stage has diverged when its mean
    exceeds the lowest by this factor.
    """

    def __init__(self, factor: float, losses: Iterable[float] = ()) -> None:
        self.factor = factor
        self._last: deque[float] = deque(maxlen=_STEPS)
        self.lowest = math.inf
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Add the loss of one more step."""
        self._last.append(loss)
        if len(self._last) == _STEPS:
            self.lowest = min(self.lowest, self.mean)

    @property
    def mean(self) -> float:
        """Mean loss of the last steps."""
        return math.fsum(self._last) / len(self._last)

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
        return self.mean / self.lowest if self._last and self.lowest > 0 else 1.0


class StepGuard:
    """Which steps to skip: gradients that are not finite, or far above those before them.

    ``spike``: a step is skipped if its gradient norm exceeds the median of the stage's last 64
    by this factor, once there are 64; 0 skips none. ``in_a_row``: how many steps in a row may be
    skipped. ``norms``: of the steps before, None where one was skipped.
    """

    def __init__(self, spike: float, in_a_row: int, norms: Iterable[float | None] = ()) -> None:
        self._spike, self._in_a_row = spike, in_a_row
        self._last: deque[float] = deque(maxlen=_NORMS)
        self._skipped = 0
        for norm in norms:
            self.add(norm)

    def most(self) -> float:
        """The largest gradient norm of a step that is taken."""
        if self._spike == 0 or len(self._last) < _NORMS:
            return math.inf
        return self._spike * statistics.median(self._last)

    def add(self, norm: float | None) -> None:
        """One more step: the norm of its gradient, None if it was skipped."""
        self._skipped = self._skipped + 1 if norm is None else 0
        if norm is not None:
            self._last.append(norm)

    @property
    def in_trouble(self) -> bool:
        """Whether the last step was skipped."""
        return self._skipped > 0

    @property
    def gives_up(self) -> bool:
        """Whether too many in a row were skipped."""
        return self._skipped > self._in_a_row


@dataclass(frozen=True)
class Guards:
    """Both guards, fed with the metrics of a stage's steps."""

    losses: LossGuard
    steps: StepGuard

    @staticmethod
    def of(
        divergence: float, spike: float, skips: int, records: Iterable[Mapping[str, Any]]
    ) -> Guards:
        """The guards after the steps that were logged."""
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
