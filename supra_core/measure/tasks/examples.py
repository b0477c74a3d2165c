"""Tasks over ``.jsonl`` files, one example a line, and those that score continuations.

Prompts and metrics are the lm-eval harness's for lambada_openai, arc_easy and piqa, so that the
figures compare: a space stands before every continuation.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.jsonfile import parse, reason
from supra_core.measure.scoring import Pair, Score, check_pairs, score
from supra_core.measure.tasks.task import Measure, Options, Record, Subject, Task
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend
from supra_core.text import ModelTokenizer, read_text


class ExampleTask(Task):
    """``fields``: what each line must have."""

    reads = "jsonl"
    fields: ClassVar[tuple[str, ...]]

    def read(self, path: Path | None, limit: int | None = None) -> list[Any]:
        """The first ``limit`` examples; FormatError names the line and the field."""
        assert path is not None
        return [
            self.example(item, f"{path}, line {number}") for number, item in objects(path, limit)
        ]

    @abstractmethod
    def example(self, item: dict[str, Any], place: str) -> Any:
        """The example of a line; FormatError names its ``place`` and the field."""

    def conditions(self, record: Record) -> str:
        return f"{record['examples']:,} examples, {record['form']} form; {record['text_form']}"


class ContinuationTask(ExampleTask):
    """A task that compares log-likelihoods of continuations. ``text_form``: how they are put."""

    text_form: ClassVar[str]

    @abstractmethod
    def pairs(self, tokenizer: ModelTokenizer, examples: Sequence[Any]) -> list[Pair]:
        """What is scored, in the examples' order; SupraError for what cannot be."""

    @abstractmethod
    def metrics(self, examples: Sequence[Any], scores: Sequence[Score]) -> dict[str, float]:
        """Metrics by name, with the standard error of each as ``NAME_stderr``."""

    def prepared(self, content: Sequence[Any], subject: Subject, options: Options) -> Measure:
        examples = content[: options.limit]
        pairs = self.pairs(subject.tokenizer, examples)
        positions = subject.spec.max_position_embeddings
        check_pairs(pairs, subject.spec.vocab_size, positions)

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            scores = score(
                model, pairs, form=subject.form, max_length=positions, progress=progress,
                stage=stage,
            )  # fmt: skip
            # Longer prompts lose their beginning.
            cut = sum(len(pair) > positions for pair in pairs)
            return {
                "metrics": self.metrics(examples, scores),
                "examples": len(examples),
                "text_form": f"{self.text_form}; {subject.tokenizer.leading_form}",
                **({"cut_prompts": cut} if cut else {}),
            }

        return measure


def objects(path: Path, limit: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """The first ``limit`` lines of a file, each its number, from 1, and object.

    Blank lines are skipped. Raises FormatError with the line that is not an object.
    """
    items: list[tuple[int, dict[str, Any]]] = []
    # Not splitlines(), for which a line also ends at characters that stand in JSON texts.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            item = parse(line)
        except ValueError as error:
            raise FormatError(
                f"{path}, line {number} is not JSON ({reason(error)}): correct it"
            ) from None
        if not isinstance(item, dict):
            raise FormatError(f"{path}, line {number} is not a JSON object: write one a line")
        items.append((number, item))
    if not items:
        raise FormatError(f"{path} holds no example: write one JSON object a line")
    return items


def text_field(item: dict[str, Any], field: str, place: str) -> str:
    """A field that must be a text and not empty."""
    value = item.get(field)
    if not isinstance(value, str):
        found = repr(value) if field in item else "absent"
        raise FormatError(f"{place}: field {field} must be a text, and is {found}")
    if not value.strip():
        raise FormatError(f"{place}: field {field} is empty: give it a text, or remove the line")
    return value


def mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for a single value."""
    array = np.array(values)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else 0.0
    return float(array.mean()), error
