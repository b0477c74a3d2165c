"""Progress on stderr: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from supra_cli.shared.output import bytes_text, log
from supra_core.progress import duration
from supra_core.visible import visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

_SECONDS_BETWEEN_LINES = 5.0
# The stages that count bytes.
_BYTES = ("download", "write")


class ProgressReporter:
    """A :class:`supra_core.progress.Progress`; use as a context manager."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""
        self._printed_at = 0.0
        self._started_at = 0.0
        self._started_with = 0
        self._finished = False

    def __enter__(self) -> ProgressReporter:
        if sys.stderr.isatty():
            self._bars = _bars()
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """``done`` of ``total`` in ``stage``, with the latest figures."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if stage in _BYTES:
            figures = f"{bytes_text(done)} of {bytes_text(total)}"
        if self._bars is not None:
            self._show(self._bars, stage, done, total, figures)
        else:
            self._print(stage, done, total, figures)

    def _show(self, bars: Bars, stage: str, done: int, total: int, figures: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = bars.add_task(visible(stage), figures="")
        bars.update(self._tasks[stage], completed=done, total=total, figures=figures)

    def _print(self, stage: str, done: int, total: int, figures: str) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started_at, self._finished = stage, now, False
            self._started_with = done
        elif self._finished or (done < total and now - self._printed_at < _SECONDS_BETWEEN_LINES):
            return
        self._printed_at = now
        self._finished = total > 0 and done >= total
        share = f"{100 * done / total:3.0f} %" if total else ""
        spent, made = now - self._started_at, done - self._started_with
        left = ""
        if made > 0 and done < total:
            left = f"  {duration(spent / made * (total - done))} left"
        line = f"{stage}  {share}  {spent:.0f} s{left}  {figures}"
        log(line.rstrip())


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[figures]}", markup=False),
        console=Console(stderr=True, emoji=False),
    )
