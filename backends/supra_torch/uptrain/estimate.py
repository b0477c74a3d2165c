"""How long a stage will take, from its first steps."""

from __future__ import annotations

import time
from collections.abc import Callable

from supra_core.progress import duration

# The first step compiles and allocates; a few more are averaged, over a while.
_FIRST, _SECONDS = 1, 20.0


class Estimate:
    """Says once, after some steps and seconds of a stage, how long the rest will take.

    ``steps``: how many are left.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._steps, self._say, self._clock = stage, steps, say, clock
        self._done, self._began = 0, 0.0
        self._said = False

    def step(self, tokens: int, memory_bytes: int | None) -> None:
        """Count a step of ``tokens``; ``memory_bytes`` is the peak so far, where it is known."""
        self._done += 1
        if self._done == _FIRST:
            self._began = self._clock()
        seconds = self._clock() - self._began
        if self._said or self._done == _FIRST or seconds < _SECONDS or self._done >= self._steps:
            return
        self._said = True
        each = seconds / (self._done - _FIRST)
        left = each * (self._steps - self._done)
        memory = "" if memory_bytes is None else f", {memory_bytes / 1e9:.1f} GB of memory"
        self._say(
            f"{self._stage}: {duration(left)} left for {self._steps - self._done:,} steps of "
            f"{each:.3g} s ({tokens / each:,.0f} tokens/s{memory})"
        )
