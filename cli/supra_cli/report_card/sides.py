"""What is measured of each model by itself, student and teacher alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from supra_cli.evaluation.figures import intervals
from supra_cli.evaluation.measurements import Measurement
from supra_cli.evaluation.sides import Side
from supra_cli.report_card.inputs import Inputs
from supra_cli.report_card.samples import sample
from supra_cli.report_card.settings import Budget
from supra_core.errors import SupraError
from supra_core.measure.probes.speed import speed
from supra_core.measure.tasks import TASKS, Record
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend

# What stands in the record where there is no figure: why.
NOT_MEASURED = "not_measured"


def attempted(measure: Callable[[], Record]) -> Record:
    """A record, or why there is none. What fails, in whatever way, costs its own figures alone: the
    others may have taken hours."""
    try:
        return measure()
    except SupraError as error:
        return {NOT_MEASURED: str(error)}
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        # Made one of ours, so that nothing in it breaks a line or steers a terminal.
        named = SupraError(f"{type(error).__name__}: {first}".removesuffix(": "))
        return {NOT_MEASURED: str(named)}


def timed(measure: Callable[[], Record]) -> Record:
    """The same with its seconds."""
    start = time.monotonic()
    return {**attempted(measure), "seconds": round(time.monotonic() - start, 1)}


class SideMeasurement:
    """One model and everything that is asked of it."""

    def __init__(
        self, side: Side, inputs: Inputs, budget: Budget, seed: int, progress: Progress
    ) -> None:
        self._side, self._inputs, self._budget = side, inputs, budget
        self._seed, self._progress = seed, progress
        self._loaded: Backend | Exception

    @property
    def _model(self) -> Backend:
        """Every section of a model that could not be loaded fails as its loading did."""
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded

    def all(self) -> dict[str, Record]:
        """Results by section; one that this model cannot take says why.

        Raises whatever loading the student does: nothing is measured yet that it could cost.
        """
        try:
            self._loaded = self._side.load()
        except Exception as error:
            if self._side.beside is None:
                raise
            self._loaded = error
        sections: dict[str, Callable[[], Record]] = {
            "quality": self._quality,
            **{name: partial(self._on_text, name) for name in ("positions", "recall", "copying")},
            "permutations": self._permutations,
            "samples": self._samples,
            "speed": self._speed,
        }
        return {name: timed(measure) for name, measure in sections.items()}

    def _quality(self) -> Record:
        """By file, under a key of their own: a file may have any name."""
        return {"files": {file.name: self._file(file) for file in self._inputs.files}}

    def _file(self, file: Measurement) -> Record:
        found = attempted(partial(self._measured, file))
        if NOT_MEASURED in found:
            return {"task": file.task.name, **found}
        return quality_record(self._side, file.task.name, found)

    def _measured(self, one: Measurement) -> Record:
        options = self._budget.options(one.task.name, self._seed)
        measure = self._side.prepared(one, options)
        return measure(self._model, self._progress, self._side.stage(one.name))

    def _on_text(self, name: str) -> Record:
        """A task on the longest text."""
        file = self._inputs.text(TASKS[name])
        return {"text": file.name, **self._measured(replace(file, name=name))}

    def _permutations(self) -> Record:
        file = self._inputs.questions(TASKS["permutations"])
        found = self._measured(replace(file, name="permutations"))
        return {"file": file.name, **found["metrics"], **found}

    def _samples(self) -> Record:
        return sample(self._side, self._model, self._budget, self._seed, self._progress)

    def _speed(self) -> Record:
        steps = self._budget.decode_steps
        room = self._model.spec.max_position_embeddings - 2 * steps
        contexts = sorted({min(context, room) for context in self._budget.contexts})
        if contexts[0] < 1:
            raise SupraError("the model has too few positions to time steps at")
        found = [
            speed(
                self._model, context, steps=steps, seed=self._seed, progress=self._progress,
                stage=self._side.stage(f"speed after {context}"),
            )
            for context in contexts
        ]  # fmt: skip
        return {"contexts": found}


def quality_record(side: Side, task: str, found: Record) -> Record:
    """A task's record with its metrics beside it and their intervals."""
    return {
        "task": task, "form": side.form, "dtype": side.dtype, "cut_prompts": 0,
        "intervals": intervals(found), **found["metrics"], **found,
    }  # fmt: skip
