"""What a report is asked for, and how much of everything is measured for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from supra_core.errors import SupraError
from supra_core.measure.tasks import Options

LEAST_LIMIT = 64


@dataclass(frozen=True)
class Budget:
    """How much is measured; tokens are of a text, examples of a task's file.

    ``position_tokens``: of the text whose positions are measured; ``distances``: of the recall
    probes, in tokens; ``sequences``: at each of them; ``answer_tokens``: of a sample, at most;
    ``contexts``: before the timed decode steps.
    """

    text_tokens: int = 20_480
    examples: int = 200
    layer_tokens: int = 4_096
    position_tokens: int = 16_384
    longest_position: int = 8_192
    distances: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    sequences: int = 32
    permuted_questions: int = 50
    variant_tokens: int = 10_240
    questions: int = 10
    answer_tokens: int = 64
    contexts: tuple[int, ...] = (512, 2_048)
    decode_steps: int = 32

    def limited(self, limit: int) -> Budget:
        """No text longer than ``limit`` tokens, no task of more than ``limit`` examples."""
        return replace(self, **{name: min(getattr(self, name), limit) for name in _LIMITED})

    def options(self, task: str, seed: int) -> Options:
        """What a task is told."""
        limits = {
            "perplexity": self.text_tokens, "positions": self.position_tokens,
            "permutations": self.permuted_questions, "recall": self.sequences,
            "copying": self.sequences,
        }  # fmt: skip
        return Options(
            limits.get(task, self.examples), seed=seed, distances=self.distances,
            longest=self.longest_position,
        )  # fmt: skip


_LIMITED = (
    "text_tokens", "examples", "layer_tokens", "position_tokens", "permuted_questions",
    "variant_tokens",
)  # fmt: skip
QUICK = Budget(
    text_tokens=2_048, examples=20, layer_tokens=1_024, position_tokens=2_048,
    longest_position=2_048, distances=(16, 32, 64, 128, 256), sequences=8, permuted_questions=8,
    variant_tokens=2_048, questions=3, answer_tokens=32, contexts=(256,), decode_steps=8,
)  # fmt: skip


@dataclass(frozen=True)
class ReportSettings:
    """``teacher`` None looks for the one that is known, unless ``no_teacher``."""

    model: str
    out: Path
    data: tuple[Path, ...] = ()
    teacher: str | None = None
    no_teacher: bool = False
    limit: int | None = None
    quick: bool = False
    backend: str | None = None
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < LEAST_LIMIT:
            raise SupraError(f"--limit must be at least {LEAST_LIMIT}, not {self.limit}")
        if not 0 <= self.seed < 2**32:
            raise SupraError(f"--seed must be from 0 to 2^32 - 1, not {self.seed}")
        if self.out.suffix != ".html":
            raise SupraError(f"--out {self.out} must end in .html: the record goes beside it")

    @property
    def budget(self) -> Budget:
        """Quick or full; ``limit`` lowers all of it, and opens what is not quick."""
        if self.limit is None:
            return QUICK if self.quick else Budget()
        opened = Budget(text_tokens=self.limit, examples=self.limit)
        return (QUICK if self.quick else opened).limited(self.limit)

    @property
    def record_path(self) -> Path:
        """The JSON record beside the page."""
        return self.out.with_suffix(".json")
