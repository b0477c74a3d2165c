"""Everything a report reads, read before anything is measured."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supra_cli.report_card.curves import Curve, read_curve
from supra_cli.report_card.settings import ReportSettings
from supra_cli.shared import pythondocs
from supra_cli.shared.backends import default_for_evaluation
from supra_core.errors import SupraError
from supra_core.measure.perplexity import DTYPE
from supra_core.measure.tasks import Passage, Question, read_passages, read_questions, task_of
from supra_core.runtime.backend import Form, check_name
from supra_core.sources.source import RUN_FILE, Source, open_source
from supra_core.sources.teacher import find_teacher
from supra_core.text import ModelTokenizer, read_text

PYTHON_TEXT = "Python documentation"
_HELD_OUT_CHARACTERS = 40_000


@dataclass(frozen=True)
class DataFile:
    """What one file holds, by its task; ``name`` stands for it in the report.

    ``origin``: its path, bytes and hash.
    """

    name: str
    task: str
    origin: dict[str, str | int]
    content: str | list[Passage] | list[Question]


@dataclass(frozen=True)
class Side:
    """One of the two models, computed in ``dtype``. A teacher has no recurrent form of its own."""

    role: str
    path: str
    backend: str
    form: Form
    dtype: str
    source: Source
    tokenizer: ModelTokenizer


@dataclass(frozen=True)
class Inputs:
    """``curve`` is None for a model that is no run of its own."""

    student: Side
    teacher: Side | None
    files: tuple[DataFile, ...]
    curve: Curve | None

    @property
    def sides(self) -> list[Side]:
        return [side for side in (self.student, self.teacher) if side is not None]

    @property
    def text(self) -> DataFile | None:
        """The longest text, which the probes take theirs from."""
        texts = [file for file in self.files if isinstance(file.content, str)]
        return max(texts, key=lambda file: len(file.content), default=None)

    @property
    def questions(self) -> tuple[str, list[Question]] | None:
        """The first multiple-choice file: its name and content."""
        for file in self.files:
            if file.task == "multiple_choice":
                return file.name, [item for item in file.content if isinstance(item, Question)]
        return None


def read_inputs(settings: ReportSettings) -> Inputs:
    """Models, tokenizers, data and the run's metrics; SupraError for what cannot be read."""
    backend = settings.backend or default_for_evaluation()
    check_name(backend)
    student = _side("student", settings.model, backend, "recurrent")
    teacher = None
    named = None if settings.no_teacher else settings.teacher or find_teacher(settings.model)
    if named is not None:
        teacher = _side("teacher", named, backend, "parallel")
        if not teacher.source.spec.is_transformer:
            raise SupraError(f"{named} is no transformer: name the original with --teacher")
    run = Path(settings.model)
    curve = read_curve(run) if os.path.isfile(run / RUN_FILE) else None
    files = _files(settings.data, settings.budget.examples)
    return Inputs(student, teacher, files, curve)


def _side(role: str, path: str, backend: str, form: Form) -> Side:
    source = open_source(path)
    return Side(role, path, backend, form, DTYPE, source, source.tokenizer())


def _files(data: Sequence[Path], examples: int) -> tuple[DataFile, ...]:
    """The named files, or Python's own documentation."""
    if not data:
        _, held_out = pythondocs.split(pythondocs.documents(), _HELD_OUT_CHARACTERS)
        origin: dict[str, str | int] = {"path": "the standard library of this Python"}
        return (DataFile(PYTHON_TEXT, "perplexity", origin, held_out),)
    files = tuple(_read(path, examples) for path in data)
    names = [file.name for file in files]
    for name in names:
        if names.count(name) > 1:
            raise SupraError(f"two files of --data would both be {name}: rename one of them")
    return files


def _read(path: Path, examples: int) -> DataFile:
    task = task_of(path)
    content: str | list[Passage] | list[Question]
    if task == "perplexity":
        content = read_text(path)
    else:
        content = (read_passages if task == "lambada" else read_questions)(path, examples)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin: dict[str, str | int] = {
        "path": str(path), "bytes": path.stat().st_size, "sha256": digest
    }  # fmt: skip
    return DataFile(path.name, task, origin, content)
