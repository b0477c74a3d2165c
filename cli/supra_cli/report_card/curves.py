"""The curves of an uptraining run, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.jsonfile import parse, read_object, reason
from supra_core.sources.source import RUN_FILE

METRICS_FILE = "metrics.jsonl"
# Points of a curve; more steps are averaged, since no page has more columns.
MOST_POINTS = 400
# A loss or perplexity above it is not one: a run bounds the latter by exp(700), about 1e304.
_LARGEST = 1e305

LOSSES = {
    "transfer": "squared error of a mixer's output over the teacher's mean square",
    "distill": "KL(teacher || student), nats a token",
    "uptrain": "cross entropy, nats a token",
}


def read_curve(run: Path) -> dict[str, Any]:
    """What a run logged, ready for JSON; :class:`FormatError` names the line that cannot be read.

    ``stages``: tokens seen and loss, each point the mean of ``steps_per_point`` steps.
    ``held_out``: the run's own held-out perplexity after some tokens. ``teacher_perplexity``: None
    for a run without a teacher.
    """
    # By index: a recipe may have two stages of one kind.
    stages: dict[tuple[int, str], list[tuple[int, float]]] = {}
    held_out: list[dict[str, float]] = []
    teacher: float | None = None
    for place, entry in _entries(run / METRICS_FILE):
        try:
            if "left_out" in entry:
                continue
            if "loss" in entry:
                index = _field(entry, "stage_index") if "stage_index" in entry else 0
                points = stages.setdefault((index, _field(entry, "stage", str)), [])
                points += [(_field(entry, "tokens"), loss) for loss in _drawn(entry, "loss")]
            elif "teacher_perplexity" in entry:
                stated = entry["teacher_perplexity"] is not None
                teacher = next(iter(_drawn(entry, "teacher_perplexity")), None) if stated else None
            elif "perplexity" in entry:
                tokens = _field(entry, "tokens")
                found = _drawn(entry, "perplexity")
                held_out += [{"tokens": tokens, "perplexity": value} for value in found]
        except KeyError as error:
            raise FormatError(
                f"{place} is not a line of an uptraining run (field {error}): remove it"
            ) from None
    config = read_object(run / RUN_FILE).get("config")
    length = config.get("sequence_length") if isinstance(config, dict) else None
    return {
        "stages": [_thinned(stage, points) for (_, stage), points in stages.items() if points],
        "held_out": held_out,
        "teacher_perplexity": teacher,
        "sequence_length": length if isinstance(length, int) else None,
    }


def _field(entry: dict[str, Any], name: str, *types: type) -> Any:
    """A field, by default a count; KeyError with its name where it is of no such type."""
    value = entry[name]
    if type(value) not in (types or (int,)) or (not types and not 0 <= value < 2**63):
        raise KeyError(name)
    return value


def _drawn(entry: dict[str, Any], name: str) -> list[float]:
    """A number, or nothing where it is NaN or infinite."""
    value = _field(entry, name, int, float)
    return [float(value)] if abs(value) < _LARGEST else []


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object with where it stands; a last line that a kill cut off is skipped."""
    if not file.is_file():
        return
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read ({error}): restore it, or remove it") from None
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        try:
            entry = parse(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise FormatError(f"{place} is not JSON ({reason(error)}): remove it") from None
        if not isinstance(entry, dict):
            raise FormatError(f"{place} is not a JSON object: remove it")
        yield place, entry


def _thinned(stage: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    every = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + every] for start in range(0, len(points), every)]
    return {
        "stage": stage,
        "loss": LOSSES.get(stage, "loss"),
        "steps": len(points),
        "steps_per_point": every,
        "tokens": [group[-1][0] for group in groups],
        "losses": [float(np.mean([loss for _, loss in group])) for group in groups],
    }
