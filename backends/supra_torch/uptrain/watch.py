"""Where a run's figures go besides ``metrics.jsonl``: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from supra_core.errors import SupraError
from supra_torch.recipes.config import ReportTo


class Sink(Protocol):
    """Takes the figures of a step, by name."""

    def add(self, step: int, figures: Mapping[str, float]) -> None: ...

    def go_back(self, step: int) -> None:
        """Drop what was added after ``step``."""
        ...

    def close(self) -> None: ...


def refuse_missing(report_to: Sequence[ReportTo]) -> None:
    """Raise SupraError when a package that is asked for is not installed."""
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise SupraError(
                f"report_to: {name} is not installed: pip install {name}, or remove it"
            )


@contextmanager
def sinks(
    report_to: Sequence[ReportTo], run: Path, config: Mapping[str, Any], step: int
) -> Iterator[list[Sink]]:
    """Open the sinks of a run that resumes after ``step``; they are closed at the end."""
    with ExitStack() as stack:
        opened = []
        for name in report_to:
            try:
                sink = _SINKS[name](run, config, step)
            # Any failure of a service: no key, no network, a run of that name that is gone.
            except Exception as error:
                said = str(error).strip().split("\n")[0] or type(error).__name__
                raise SupraError(
                    f"report_to: {name} failed to start ({said}): set it up, or remove it"
                ) from None
            stack.callback(sink.close)
            opened.append(sink)
        yield opened


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics that become curves, by the names of these."""
    group = record.get("stage") or record.get("evaluation")
    if group is None:
        return {}
    left_out = {"step", "stage_index", "step_tokens"}
    return {
        f"{group}/{name}": float(value)
        for name, value in record.items()
        if name not in left_out and isinstance(value, int | float) and math.isfinite(value)
    }


class _TensorBoard:
    """Event files in ``RUN/tensorboard``."""

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        self._folder = str(run / "tensorboard")
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def go_back(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run of Weights & Biases that every start of this run continues.

    Project, entity and mode are those of its environment variables (WANDB_PROJECT, WANDB_MODE).
    """

    def __init__(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        import wandb

        place = str(run.resolve())
        self._run = wandb.init(
            dir=place,
            name=run.name,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            resume="allow",
            config=dict(config),
        )
        # Its own step only counts up; a resumed run repeats steps.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def go_back(self, step: int) -> None:
        # Its curves show both ways.
        pass

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[ReportTo, Callable[[Path, Mapping[str, Any], int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}
