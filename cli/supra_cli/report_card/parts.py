"""What a page is made of, and how numbers are written in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A number of the record as it is shown; several where an interval stands beside it."""

    text: str
    values: tuple[float, ...] = ()


Row = tuple[str | Cell, ...]


@dataclass(frozen=True)
class Table:
    """The first column is text; ``columns`` name all of them."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """An SVG element, and what it shows in words."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Answer:
    """A sample: the question with its temperature, and what each model said."""

    question: str
    texts: tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True)
class Section:
    """One part of the page. ``how`` says how every number of it was obtained."""

    key: str
    title: str
    how: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    answers: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = field(default=())


ABSENT = Cell("–")


def number(value: float | None, digits: int = 4, unit: str = "") -> Cell:
    """``digits`` significant digits, with thousands separated."""
    if value is None:
        return ABSENT
    return Cell(_digits(value, digits) + unit, (value,))


def count(value: float | None) -> Cell:
    """A whole number, with thousands separated."""
    return ABSENT if value is None else Cell(f"{value:,.0f}", (value,))


def share(value: float | None, interval: Sequence[float] | None = None) -> Cell:
    """A share in percent with its interval."""
    if value is None:
        return ABSENT
    text = f"{100 * value:.1f} %"
    if interval is None:
        return Cell(text, (value,))
    low, high = interval
    return Cell(f"{text} ({100 * low:.1f}–{100 * high:.1f})", (value, low, high))


def spread(value: float | None, low: float, high: float, digits: int = 4) -> Cell:
    """A number with the two that bound it."""
    if value is None:
        return ABSENT
    shown = [_digits(x, digits) for x in (value, low, high)]
    return Cell(f"{shown[0]} ({shown[1]}–{shown[2]})", (value, low, high))


def size(value: float) -> Cell:
    """Bytes in the unit that suits them."""
    from supra_cli.shared.output import bytes_text

    return Cell(bytes_text(value), (value,))


def measured(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result, or None where there is no figure."""
    return None if result is None or "not_measured" in result else result


def reasons(section: dict[str, Any]) -> tuple[str, ...]:
    """Why a figure is missing: of the whole section, or of one model."""
    if "not_measured" in section:
        return (f"Not measured: {section['not_measured']}.",)
    return tuple(
        f"Not measured of the {role}: {result['not_measured']}."
        for role in ("student", "teacher")
        if (result := section.get(role)) is not None and "not_measured" in result
    )


def _digits(value: float, digits: int) -> str:
    if value != value or abs(value) == float("inf"):
        return "beyond measure"
    if abs(value) >= 1e9:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")
