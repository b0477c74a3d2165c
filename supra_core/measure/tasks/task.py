"""What a task is: it reads its examples, checks them for a model, and scores them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend, Form
from supra_core.text import EncodedText, ModelTokenizer

Int64 = npt.NDArray[np.int64]
# A result that is ready for JSON: ``metrics`` by name, and what it was measured on.
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a task can be told; each uses what concerns it. SupraError for a number too small.

    ``limit``: tokens of a text, examples of a file, or generated sequences; None: all, or the
    task's default. ``length``: tokens in a window of text, ``batch``: windows computed together.
    ``distances``: in tokens. ``longest``: tokens in the longest sequence that positions are of.
    """

    limit: int | None = None
    length: int = 512
    batch: int = 4
    seed: int = 0
    distances: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    longest: int = 8_192

    def __post_init__(self) -> None:
        for name, least in (("limit", 2), ("length", 2), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SupraError(f"{name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Subject:
    """What is known of a model before its weights are loaded.

    ``beside``: for a teacher, the student's tokenizer, whose tokens a limit counts.
    """

    spec: ModelSpec
    tokenizer: ModelTokenizer
    form: Form = "parallel"
    beside: ModelTokenizer | None = None

    def encoded(self, content: str, limit: int | None) -> tuple[EncodedText, bool]:
        """The first ``limit`` tokens of a text, and whether ``beside`` divides it alike."""
        text = (self.beside or self.tokenizer).encode(content)
        text = text if limit is None else text.head(limit)
        return (text, True) if self.beside is None else self.tokenizer.same_stretch(text)


class Measure(Protocol):
    """What is left to do once everything is checked: the record of the loaded model."""

    def __call__(self, model: Backend, progress: Progress, stage: str) -> Record: ...


class Task(ABC):
    """A task; :data:`supra_core.measure.tasks.TASKS` holds all of them.

    ``reads``: a text file, a ``.jsonl`` file, or nothing: it generates its examples, and takes the
    text between them from a text file if there is one.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["text", "jsonl", "nothing"]]

    @abstractmethod
    def read(self, path: Path | None, limit: int | None = None) -> Any:
        """The content of a file; SupraError for one that cannot be read."""

    @abstractmethod
    def prepared(self, content: Any, subject: Subject, options: Options) -> Measure:
        """What measures the content; SupraError for whatever the model cannot be asked."""

    @abstractmethod
    def conditions(self, record: Record) -> str:
        """How the figures of a record were obtained, for people."""
