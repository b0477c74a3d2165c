"""Everything a report reads, read before anything is measured."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_cli.evaluation.measurements import Measurement, refuse_repeated
from supra_cli.evaluation.sides import Side, open_sides
from supra_cli.report_card.curves import read_curve
from supra_cli.report_card.settings import ReportSettings
from supra_cli.shared import pythondocs
from supra_core.errors import SupraError
from supra_core.measure.tasks import TASKS, Task, tasks_of
from supra_core.sources.source import RUN_FILE

PYTHON_TEXT = "Python documentation"
_HELD_OUT_CHARACTERS = 40_000


@dataclass(frozen=True)
class Inputs:
    """``files``: each by its own task. ``curve``: None for a model that was not given as a run."""

    sides: list[Side]
    files: list[Measurement]
    curve: dict[str, Any] | None

    @property
    def student(self) -> Side:
        return self.sides[0]

    @property
    def teacher(self) -> Side | None:
        return self.sides[1] if len(self.sides) > 1 else None

    def text(self, task: Task = TASKS["perplexity"]) -> Measurement:
        """A task on the longest text; SupraError where no file is a text."""
        texts = [file for file in self.files if file.task.reads == "text"]
        if not texts:
            raise SupraError("none of the files is a text: name one with --data")
        longest = max(texts, key=lambda file: len(file.content))
        return Measurement(longest.name, task, longest.path, longest.content)

    def questions(self, task: Task) -> Measurement:
        """A task on the first file of questions; SupraError where there is none."""
        for file in self.files:
            if file.task is TASKS["multiple_choice"]:
                return Measurement(file.name, task, file.path, file.content)
        raise SupraError("none of the files is a multiple-choice file: name one with --data")


def read_inputs(settings: ReportSettings) -> Inputs:
    """Models, tokenizers, data and the run's metrics; SupraError for what cannot be read."""
    sides = open_sides(
        settings.model, teacher=settings.teacher, no_teacher=settings.no_teacher,
        backend=settings.backend, form="recurrent", role="student",
    )  # fmt: skip
    run = Path(settings.model)
    curve = read_curve(run) if os.path.isfile(run / RUN_FILE) else None
    files = [_read(path, settings.budget.examples) for path in settings.data]
    refuse_repeated([file.name for file in files])
    return Inputs(sides, files or [_python_text()], curve)


def _python_text() -> Measurement:
    _, held_out = pythondocs.split(pythondocs.documents(), _HELD_OUT_CHARACTERS)
    return Measurement(PYTHON_TEXT, TASKS["perplexity"], None, held_out)


def _read(path: Path, examples: int) -> Measurement:
    task = tasks_of(path)[0]
    return Measurement(path.name, task, path, task.read(path, examples))


def origin(file: Measurement) -> dict[str, Any]:
    """What tells a file from others: its path, bytes and hash."""
    if file.path is None:
        return {"path": "the standard library of this Python"}
    with open(file.path, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"path": str(file.path), "bytes": file.path.stat().st_size, "sha256": digest}
