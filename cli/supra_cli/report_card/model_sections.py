"""The sections about quality and its sources: texts, tasks, layers, training, parts."""

from __future__ import annotations

from functools import partial
from typing import Any

from supra_cli.evaluation.figures import notes
from supra_cli.report_card import figures
from supra_cli.report_card.parts import (
    MODELS,
    Cell,
    Content,
    Figure,
    Found,
    Row,
    Section,
    Table,
    cells,
    count,
    found_of,
    grouped,
    number,
    part,
    reasons,
    section_of,
    share,
    some,
    spread,
)

_LAYERS_A_ROW = 10
_FORMS = {"recurrent": " (each sequence in pieces, each from the state of those before)"}
_MOST_EVALUATIONS = 12


def quality(record: dict[str, Any]) -> Section:
    """Perplexity of texts, and tasks."""
    files = record["quality"]["files"]
    texts = {name: file for name, file in files.items() if file["task"] == "perplexity"}
    others = {name: file for name, file in files.items() if name not in texts}
    tables = [table(some) for table, some in ((_texts, texts), (_tasks, others)) if some]
    said = [
        f"{note}."
        for name, file in files.items()
        for role in MODELS
        for note in notes(name, role, file[role])
    ]
    said += (note for file in files.values() for note in reasons(file))
    model = record["model"]
    fields = {**model, "pieces": _FORMS.get(model["form"], "")}
    return section_of("quality", Content(tables, fields=fields), said)


def _texts(files: dict[str, Any]) -> Table:
    rows: list[Row] = []
    for name, file in files.items():
        ours, theirs = file["student"], file["teacher"] or {}
        rows.append(
            (
                name,
                *(number(side.get("perplexity")) for side in (ours, theirs)),
                number(file["ratio"], 3, " ×"),
                *(number(side.get("bits_per_byte")) for side in (ours, theirs)),
                count(ours.get("tokens", theirs.get("tokens"))),
            )
        )
    columns = (
        "text", "perplexity, student", "teacher", "ratio", "bits/byte, student", "teacher",
        "tokens",
    )  # fmt: skip
    return Table(columns, rows, "Perplexity of texts")


def _tasks(files: dict[str, Any]) -> Table:
    rows: list[Row] = []
    for name, file in files.items():
        found = found_of(file)
        for metric in some(found)["intervals"] if found else ():
            ours = cells(found, partial(_metric, metric=metric))
            rows.append((f"{name}: {metric}", *ours, count(some(found)["examples"])))
    return Table(("task and metric", *MODELS, "examples"), rows, "Tasks")


def _metric(result: dict[str, Any], metric: str) -> Cell:
    value, interval = result["metrics"][metric], result["intervals"][metric]
    if metric == "perplexity":
        return number(value) if interval is None else spread(value, *interval)
    return share(value, interval)


@part("layers", "layer_errors")
def layer_errors(section: dict[str, Any], _: Found) -> Content:
    """The transfer error of each linear layer, ten layers a row."""
    errors = {one["layer"]: one["error"] for one in section["layers"]}
    offsets = range(_LAYERS_A_ROW)
    rows: list[Row] = [
        (f"{first} + ...", *(number(errors.get(first + offset), 3) for offset in offsets))
        for first in range(0, max(errors) + 1, _LAYERS_A_ROW)
    ]
    rows.append(("mean", number(section["mean"], 3), *[""] * (_LAYERS_A_ROW - 1)))
    table = Table(("layer", *map(str, offsets)), rows, "Error of each layer, ten a row")
    caption = "A bar for each linear layer; dotted: the mean."
    return Content([table], [Figure(figures.layer_errors(section), caption)], fields=section)


@part("training", "training")
def training(section: dict[str, Any], _: Found) -> Content:
    """The run's curves."""
    rows: list[Row] = [
        (
            f"{stage['stage']}: {stage['loss']}",
            count(stage["steps"]),
            count(stage["tokens"][-1]),
            number(stage["losses"][0], 3),
            number(stage["losses"][-1], 3),
        )
        for stage in section["stages"]
    ]
    columns = ("stage and its loss", "steps", "tokens at its end", "first loss", "last loss")
    tables = [Table(columns, rows, "Stages")]
    if section["held_out"]:
        tables.append(_held_out(section))
    averaged = max(stage["steps_per_point"] for stage in section["stages"])
    beside = "" if section["teacher_perplexity"] is None else " beside the run's teacher's (dashed)"
    caption = f"The loss of each stage, and the held-out perplexity{beside}."
    means = f"Points and the losses below are means of up to {averaged} steps."
    fields = {"means": means if averaged > 1 else ""}
    return Content(tables, [Figure(figures.training(section), caption)], fields=fields)


def _held_out(section: dict[str, Any]) -> Table:
    """Evenly chosen evaluations where there are many, the last one always."""
    found = section["held_out"]
    every = -(-len(found) // _MOST_EVALUATIONS)
    rows: list[Row] = [
        (f"after {one['tokens']:,} tokens", number(one["perplexity"]))
        for one in found[::-every][::-1]
    ]
    if section["teacher_perplexity"] is not None:
        rows.append(("the run's own teacher", number(section["teacher_perplexity"])))
    return Table(("held-out text of the run", "perplexity"), rows, "Held-out perplexity")


def positions(record: dict[str, Any]) -> Section:
    """Perplexity by position, where the run's own sequences end as well."""
    trained = record["training"].get("sequence_length")

    @part("positions", "positions")
    def section(whole: dict[str, Any], found: Found) -> Content:
        tables = [_position_table(curve, found) for curve in some(found)["curves"]]
        drawn = Figure(figures.positions(whole, trained), "Bars show 95 % intervals.")
        return Content(tables, [drawn], fields=some(found))

    return section(record)


def _position_table(curve: dict[str, Any], found: Found) -> Table:
    """All models' bins, by their bounds, in sequences as long as those of ``curve``."""
    alike = {
        role: other
        for role, result in found.items()
        for other in result["curves"]
        if other["length"] == curve["length"]
    }
    rows: list[Row] = [
        (
            f"{first:,} to {stop - 1:,}",
            *cells(ours, lambda one: spread(one["perplexity"], one["low"], one["high"], 3)),
            count(some(ours)["tokens"]),
        )
        for (first, stop), ours in grouped(alike, "bins", "first", "stop")
    ]
    caption = f"Sequences of {curve['length']:,} tokens ({curve['sequences']} of them)"
    return Table(("positions", *MODELS, "tokens"), rows, caption)


_VARIANTS = {
    "whole": "whole",
    "without_window": "without its window: linear attention only",
    "window_alone": "its window alone: softmax over the last tokens only",
}


@part("variants", "variants")
def variants(section: dict[str, Any], _: Found) -> Content:
    """A windowed model taken apart."""
    rows: list[Row] = [
        (
            label,
            number(section[key]["perplexity"]),
            number(section[key].get("ratio"), 3, " ×"),
            number(section[key]["bits_per_byte"]),
            count(section[key]["tokens"]),
        )
        for key, label in _VARIANTS.items()
    ]
    columns = ("student", "perplexity", "ratio to the whole", "bits/byte", "tokens")
    return Content([Table(columns, rows)], fields=section)
