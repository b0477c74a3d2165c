"""What a page is made of, and how numbers are written in it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from supra_cli.shared.output import bytes_text


@dataclass(frozen=True)
class Cell:
    """A number of the record as it is shown; several where an interval stands beside it."""

    text: str
    values: tuple[float, ...] = ()


Row = tuple[str | Cell, ...]


@dataclass(frozen=True)
class Table:
    """The first column is text; ``columns`` name all of them."""

    columns: Sequence[str]
    rows: Sequence[Row]
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
    texts: Sequence[tuple[str, str, bool]]


@dataclass(frozen=True)
class Content:
    """What a section shows. ``fields``: of the record, for the text on how it was obtained."""

    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    answers: Sequence[Answer] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """One part of the page. ``how`` says how every number of it was obtained."""

    key: str
    title: str
    how: str
    content: Content
    notes: Sequence[str] = ()


_TEXTS = tomllib.loads(files(__package__).joinpath("templates/sections.toml").read_text("utf-8"))
_NOTHING = Content(())


def section_of(key: str, content: Content, notes: Iterable[str] = ()) -> Section:
    """A section with its texts; each note appears once."""
    texts = _TEXTS[key]
    how = texts["how"] if content is _NOTHING else f"{texts['how']} {texts.get('more', '')}"
    how = " ".join(how.split()).format_map(content.fields).rstrip()
    return Section(key, texts["title"], how, content, list(dict.fromkeys(notes)))


# The results of those models that were measured, by role.
Found = dict[str, dict[str, Any]]
MODELS = ("student", "teacher")
ABSENT = Cell("–")


Build = Callable[[dict[str, Any], Found], Content]


def part(key: str, name: str) -> Callable[[Build], Callable[[dict[str, Any]], Section]]:
    """Makes a section of what builds the content of ``record[name]``, where it was measured.

    The builder gets that part of the record, and what was found by model.
    """

    def made(build: Build) -> Callable[[dict[str, Any]], Section]:
        def built(record: dict[str, Any]) -> Section:
            whole = record[name]
            found = found_of(whole)
            absent = "not_measured" in whole or ("student" in whole and not found)
            return section_of(key, _NOTHING if absent else build(whole, found), reasons(whole))

        return built

    return made


def found_of(whole: dict[str, Any]) -> Found:
    """The results of those models that were measured."""
    return {role: result for role in MODELS if (result := measured(whole.get(role)))}


def grouped(found: Found, key: str, *names: str) -> list[tuple[tuple[int, ...], Found]]:
    """The items of lists ``key`` by the numbers that name them, rising, each by model."""
    groups: dict[tuple[int, ...], Found] = {}
    for role, result in found.items():
        for one in result[key]:
            groups.setdefault(tuple(one[name] for name in names), {})[role] = one
    return sorted(groups.items())


def some(found: Found) -> dict[str, Any]:
    """What any of the models has, the student first."""
    return next(iter(found.values()))


def cells(found: Found, show: Callable[[dict[str, Any]], Cell]) -> Iterator[Cell]:
    """A cell for each model, empty where it was not measured."""
    return (show(found[role]) if role in found else ABSENT for role in MODELS)


def number(value: float | None, digits: int = 4, unit: str = "") -> Cell:
    """``digits`` significant digits, with thousands separated."""
    if value is None:
        return ABSENT
    return Cell(_digits(value, digits) + unit, (value,))


def count(value: float | None) -> Cell:
    """A whole number, with thousands separated."""
    return ABSENT if value is None else Cell(f"{value:,.0f}", (value,))


def share(value: float, interval: Sequence[float] | None = None) -> Cell:
    """A share in percent with its interval."""
    text = f"{100 * value:.1f} %"
    if interval is None:
        return Cell(text, (value,))
    low, high = interval
    return Cell(f"{text} ({100 * low:.1f}–{100 * high:.1f})", (value, low, high))


def spread(value: float, low: float, high: float, digits: int = 4) -> Cell:
    """A number with the two that bound it."""
    shown = [_digits(x, digits) for x in (value, low, high)]
    return Cell(f"{shown[0]} ({shown[1]}–{shown[2]})", (value, low, high))


def size(value: float) -> Cell:
    """Bytes in the unit that suits them."""
    return Cell(bytes_text(value), (value,))


def measured(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """The result, or None where there is no figure."""
    return None if result is None or "not_measured" in result else result


def reasons(section: dict[str, Any]) -> list[str]:
    """Why a figure is missing: of the whole section, or of one model."""
    if "not_measured" in section:
        return [f"Not measured: {section['not_measured']}."]
    return [
        f"Not measured of the {role}: {result['not_measured']}."
        for role in MODELS
        if "not_measured" in (result := section.get(role) or {})
    ]


def _digits(value: float, digits: int) -> str:
    if value != value or abs(value) == float("inf"):
        return "beyond measure"
    if abs(value) >= 1e9:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")
