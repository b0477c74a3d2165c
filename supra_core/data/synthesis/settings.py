"""The settings of a synthesis, and which batch comes next."""

from __future__ import annotations

from dataclasses import dataclass

from supra_core.data.synthesis.folder import Tally
from supra_core.data.synthesis.rows import Kind
from supra_core.errors import SupraError


@dataclass(frozen=True)
class Settings:
    """What determines the text, besides the model; ``conversations`` None: the model's default."""

    tokens: int
    conversations: float | None
    length: int
    batch: int
    temperature: float
    top_p: float
    seed: int
    turns: int
    dtype: str | None = None

    def __post_init__(self) -> None:
        share = self.conversations
        for name, fits, allowed in (
            ("tokens", self.tokens >= 1, "at least 1"),
            ("conversations", share is None or 0 <= share <= 1, "from 0 to 1"),
            ("length", self.length >= 2, "at least 2"),
            ("batch", self.batch >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < float("inf"), "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            ("turns", self.turns >= 1, "at least 1"),
        ):
            if not fits:
                raise SupraError(f"`{name}` must be {allowed}, not {getattr(self, name)}")


def next_batch(tally: Tally, settings: Settings) -> tuple[Kind, int]:
    """The kind that is behind its share, and up to ``batch`` rows for the missing tokens.

    Both depend on earlier batches alone, so that a resumed run equals an uninterrupted one. The
    estimate of a sample is half of ``length``.
    """
    share = settings.conversations or 0.0
    behind = share > 0 and tally.tokens["conversation"] <= share * tally.total
    missing = settings.tokens - tally.total
    rows = max(1, min(settings.batch, -(-2 * missing // settings.length)))
    return ("conversation" if behind else "document"), rows
