"""How long-running functions report their progress."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """``done`` of ``total`` in the named stage; metrics are the latest figures, by name."""

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None: ...


def silent(stage: str, done: int, total: int, **metrics: float) -> None:
    """A :class:`Progress` that reports nothing."""


def duration(seconds: float) -> str:
    """A time in the two units that suit it: 3 d 4 h, 2 h 5 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    for (large, size), (small, part) in zip(units, units[1:], strict=False):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole} s"
