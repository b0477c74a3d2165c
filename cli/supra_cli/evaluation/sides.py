"""The two models that are compared, opened and checked before anything is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from supra_cli.evaluation.measurements import Measurement
from supra_cli.shared.backends import default_for_evaluation
from supra_cli.shared.output import log
from supra_core.errors import SupraError
from supra_core.measure.perplexity import DTYPE
from supra_core.measure.tasks import Measure, Options, Record, Subject
from supra_core.progress import Progress
from supra_core.runtime import backend as backends
from supra_core.runtime.backend import Backend, Form
from supra_core.sources.source import Source, open_source
from supra_core.sources.teacher import find_teacher, open_teacher
from supra_core.text import ModelTokenizer


@dataclass(frozen=True)
class Side:
    """One of the two models, computed in ``dtype``. A teacher stands ``beside`` its student."""

    role: str
    path: str
    backend: str
    form: Form
    dtype: str
    source: Source
    tokenizer: ModelTokenizer
    beside: Side | None = None

    @property
    def computed(self) -> dict[str, Any]:
        """What a record says of how the model was computed."""
        return {
            "model": self.path, "backend": self.backend, "form": self.form, "dtype": self.dtype
        }  # fmt: skip

    def load(self) -> Backend:
        """The model in its backend."""
        return backends.load(self.backend, self.path, dtype=self.dtype)

    def prepared(self, one: Measurement, options: Options) -> Measure:
        """What measures the loaded model; SupraError names the file and the model."""
        beside = None if self.beside is None else self.beside.tokenizer
        subject = Subject(self.source.spec, self.tokenizer, self.form, beside)
        try:
            return one.task.prepared(one.content, subject, options)
        except SupraError as error:
            raise SupraError(f"{one.path or one.name} with {self.path}: {error}") from None

    def stage(self, name: str) -> str:
        """How progress names what is measured of this model."""
        return f"{self.role}: {name}"


def open_sides(
    model: str,
    *,
    teacher: str | None = None,
    no_teacher: bool = False,
    backend: str | None = None,
    form: Form = "parallel",
    dtype: str | None = None,
    role: str = "model",
) -> list[Side]:
    """The model, and its teacher where one is named or known.

    SupraError for a model that cannot be read, and for a teacher that is not a transformer.
    """
    if no_teacher and teacher is not None:
        raise SupraError("--teacher and --no-teacher exclude each other: give one of them")
    name = backend or default_for_evaluation()
    backends.check_name(name)

    def side(role: str, path: str, source: Source, form: Form, beside: Side | None = None) -> Side:
        return Side(role, path, name, form, dtype or DTYPE, source, source.tokenizer(), beside)

    first = side(role, model, open_source(model), form)
    known = None if no_teacher else teacher or find_teacher(model)
    if known is not None:
        # A teacher has no recurrent form of its own to compare with.
        return [first, side("teacher", known, open_teacher(known), "parallel", first)]
    if not no_teacher and not first.source.spec.is_transformer:
        log(f"no teacher of {model} is known here: name it with --teacher, or give --no-teacher")
    return [first]


def measured(
    side: Side, items: Sequence[Measurement], prepared: Sequence[Measure], progress: Progress
) -> dict[str, Record]:
    """The records by name; ``prepared``: what measures each of the items."""
    model, records = side.load(), {}
    for item, measure in zip(items, prepared, strict=True):
        start = time.monotonic()
        found = measure(model, progress, side.stage(item.name))
        records[item.name] = {
            **side.computed,
            "data": "generated" if item.path is None else str(item.path),
            **found,
            "seconds": round(time.monotonic() - start, 1),
        }
    return records
