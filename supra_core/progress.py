"""How long-running functions say how far they are."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``done`` of ``total`` in the named stage; metrics are the latest figures, by name."""

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None: ...


def silent(stage: str, done: int, total: int, **metrics: float) -> None:
    """A :class:`Progress` that says nothing."""
