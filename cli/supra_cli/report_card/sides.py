"""What is measured of each model by itself, student and teacher alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_cli.report_card.inputs import DataFile, Inputs, Side
from supra_cli.report_card.samples import sample
from supra_cli.report_card.settings import Budget
from supra_core.errors import SupraError
from supra_core.measure import tasks
from supra_core.measure.intervals import around, of_share
from supra_core.measure.perplexity import beyond_positions, perplexity
from supra_core.measure.probes.permutations import TEXT_FORM, option_permutations
from supra_core.measure.probes.positions import by_position
from supra_core.measure.probes.recall import associative_recall, copying
from supra_core.measure.probes.speed import speed
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend, load
from supra_core.text import EncodedText

Result = dict[str, Any]

# Sequences of one length are enough up to here; longer ones have curves of their own.
SHORT_POSITION = 2_048
_SHORTEST_POSITION = 16


def not_measured(reason: str) -> Result:
    """What stands in the record where there is no figure."""
    return {"not_measured": reason}


def failed(error: Exception) -> Result:
    """The same for an error: ours is a sentence, another is named before its first line."""
    if isinstance(error, SupraError):
        return not_measured(str(error))
    first = next(iter(str(error).splitlines()), "")
    # Made one of ours, so that nothing in it breaks a line or steers a terminal.
    return not_measured(str(SupraError(f"{type(error).__name__}: {first}".removesuffix(": "))))


class SideMeasurement:
    """One loaded model and everything that is asked of it.

    What fails, in whatever way, costs its own section alone: the others may have taken hours.
    """

    def __init__(self, side: Side, inputs: Inputs, budget: Budget, seed: int, progress: Progress):
        self._side, self._inputs, self._budget = side, inputs, budget
        self._seed, self._progress = seed, progress
        self._model: Backend

    def all(self) -> Result:
        """Results by section; a probe that this model cannot take says why.

        Raises whatever loading the student does: there is nothing yet that it could cost.
        """
        sections: dict[str, Callable[[], Result]] = {
            "quality": self._quality,
            "positions": self._positions,
            "recall": self._recall,
            "copying": self._copying,
            "permutations": self._permutations,
            "samples": self._samples,
            "speed": self._speed,
        }
        try:
            self._model = load(self._side.backend, self._side.path, dtype=self._side.dtype)
        except Exception as error:
            if self._side.role == "student":
                raise
            return self._without_model(sections, failed(error))
        results = {}
        for name, measure in sections.items():
            start = time.monotonic()
            try:
                results[name] = measure()
            except Exception as error:
                results[name] = failed(error)
            results[name]["seconds"] = round(time.monotonic() - start, 1)
        return results

    def _without_model(self, sections: Iterable[str], reason: Result) -> Result:
        files = {file.name: {"task": file.task, **reason} for file in self._inputs.files}
        return {
            name: {**({"files": files} if name == "quality" else reason), "seconds": 0.0}
            for name in sections
        }

    def _quality(self) -> Result:
        """By file, under a key of their own: a file may have any name."""
        files: Result = {}
        for file in self._inputs.files:
            try:
                files[file.name] = self._measured(file)
            except Exception as error:
                files[file.name] = {"task": file.task, **failed(error)}
        return {"files": files}

    def _measured(self, file: DataFile) -> Result:
        stage = f"{self._side.role}: {file.name}"
        if isinstance(file.content, str):
            student = self._inputs.student
            text = student.tokenizer.encode(file.content).head(self._budget.text_tokens)
            alike = True
            if self._side is not student:
                text, alike = self._side.tokenizer.same_stretch(text)
            found = text_result(self._model, self._side, text, self._progress, stage)
            return found if alike else {**found, "same_tokens": False}
        measure: Any = tasks.lambada if file.task == "lambada" else tasks.multiple_choice
        task = measure(
            self._model, self._side.tokenizer, file.content, form=self._side.form,
            max_length=self._model.spec.max_position_embeddings, progress=self._progress,
            stage=stage,
        )  # fmt: skip
        metrics = task.metrics
        return {
            "task": file.task,
            "metrics": metrics,
            "intervals": {
                name: _interval(name, value, metrics[f"{name}_stderr"], task.examples)
                for name, value in metrics.items()
                if f"{name}_stderr" in metrics
            },
            "examples": task.examples,
            "text_form": task.text_form,
            "cut_prompts": task.cut_prompts,
        }

    def _ids(self) -> tuple[str, npt.NDArray[np.int64]]:
        """The text that the probes take theirs from: its name, and as many ids as any needs."""
        file = self._inputs.text
        if file is None or not isinstance(file.content, str):
            raise SupraError("none of the files is a text: name one with --data")
        return file.name, self._side.tokenizer.encode(file.content).ids

    def _positions(self) -> Result:
        name, ids = self._ids()
        ids = ids[: self._budget.position_tokens]
        curves = []
        for length in position_lengths(len(ids), self._budget.longest_position):
            rows = self._side.tokenizer.rows(ids, length)
            if self._side.role == "teacher":
                rows = rows[:, : self._model.spec.max_position_embeddings]
            stage = f"{self._side.role}: positions to {length}"
            bins = by_position(self._model, rows, progress=self._progress, stage=stage)
            curves.append(
                {
                    "length": length,
                    "measured_length": rows.shape[1],
                    "sequences": len(rows),
                    "bins": [asdict(found) for found in bins],
                }
            )
        if not curves:
            raise SupraError(f"{name} has too few tokens for positions: name a longer text")
        return {"text": name, "curves": curves}

    def _recall(self) -> Result:
        return self._by_distance(associative_recall, "recall")

    def _copying(self) -> Result:
        return self._by_distance(copying, "copying")

    def _by_distance(self, probe: Any, name: str) -> Result:
        _, filler = self._ids()
        found = probe(
            self._model, self._side.tokenizer, filler,
            distances=self._budget.distances, sequences=self._budget.sequences, seed=self._seed,
            progress=self._progress, stage=f"{self._side.role}: {name}",
        )  # fmt: skip
        if not found:
            raise SupraError("no distance fits into the model's positions")
        return {
            "sequences": self._budget.sequences,
            "by_chance": found[0].by_chance,
            "distances": [asdict(result) for result in found],
        }

    def _permutations(self) -> Result:
        if self._inputs.questions is None:
            return not_measured("none of the files is a multiple-choice file: name one with --data")
        name, questions = self._inputs.questions
        found = option_permutations(
            self._model, self._side.tokenizer, questions[: self._budget.permuted_questions],
            form=self._side.form, seed=self._seed, progress=self._progress,
            stage=f"{self._side.role}: permutations",
        )  # fmt: skip
        text_form = f"{TEXT_FORM}; {self._side.tokenizer.leading_form}"
        return {"file": name, "text_form": text_form, **asdict(found)}

    def _samples(self) -> Result:
        budget = self._budget
        return sample(
            self._side, self._model, budget.questions, budget.answer_tokens, self._seed,
            self._progress,
        )  # fmt: skip

    def _speed(self) -> Result:
        room = self._model.spec.max_position_embeddings - 2 * self._budget.decode_steps
        contexts = sorted({min(context, room) for context in self._budget.contexts})
        if contexts[0] < 1:
            raise SupraError("the model has too few positions to time steps at")
        found = [
            speed(
                self._model, context, steps=self._budget.decode_steps, seed=self._seed,
                progress=self._progress, stage=f"{self._side.role}: speed after {context}",
            )
            for context in contexts
        ]  # fmt: skip
        return {"contexts": [asdict(one) for one in found]}


def _interval(metric: str, value: float, error: float, examples: int) -> tuple[float, float] | None:
    """95 %: Wilson's for a share, around the logarithm for a perplexity; one example has none."""
    if metric.startswith("acc"):
        return of_share(round(value * examples), examples)
    if examples < 2 or not math.isfinite(value):
        return None
    # The error of a perplexity is that of its logarithm times itself.
    low, high = around(math.log(value), error / value)
    return math.exp(low), math.exp(min(high, 700.0))


def text_result(
    model: Backend, side: Side, text: EncodedText, progress: Progress, stage: str
) -> Result:
    """Perplexity as ``supra eval`` measures it."""
    found = perplexity(model, text, form=side.form, progress=progress, stage=stage)
    beyond = beyond_positions(model.spec, min(found.length, len(text.ids)))
    return {"task": "perplexity", "form": side.form, "dtype": side.dtype, **asdict(found), **beyond}


def position_lengths(tokens: int, longest: int) -> list[int]:
    """The lengths to measure: a short one, and the longest power of two that the text fills."""
    if tokens < _SHORTEST_POSITION:
        return []
    most = min(2 ** int(math.log2(tokens)), longest)
    return sorted({min(SHORT_POSITION, most), most})
