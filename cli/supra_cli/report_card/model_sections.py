"""The sections about quality and its sources: texts, tasks, layers, training, parts."""

from __future__ import annotations

from typing import Any

from supra_cli.evaluation.figures import notes
from supra_cli.report_card import figures
from supra_cli.report_card.parts import (
    Cell,
    Figure,
    Row,
    Section,
    Table,
    count,
    measured,
    number,
    reasons,
    share,
    spread,
)

_MODELS = ("student", "teacher")
_LAYERS_A_ROW = 10
_FORMS = {"recurrent": " (each sequence in pieces, each from the state of those before)"}
_MOST_EVALUATIONS = 12


def quality(record: dict[str, Any]) -> Section:
    """Perplexity of texts, and tasks."""
    section = record["quality"]
    files = section["files"]
    texts = {name: file for name, file in files.items() if file["task"] == "perplexity"}
    others = {name: file for name, file in files.items() if file["task"] != "perplexity"}
    tables = []
    if texts:
        tables.append(_texts(texts))
    if others:
        tables.append(_tasks(others))
    form = record["model"]["form"]
    said = [
        f"{note}."
        for name, file in files.items()
        for role in _MODELS
        for note in notes(name, role, file[role])
    ]
    said += dict.fromkeys(note for file in files.values() for note in reasons(file))
    return Section(
        "quality",
        "Text and tasks",
        f"Computed in {record['model']['dtype']}; the student in its {form} form"
        f"{_FORMS.get(form, '')}, a teacher in its parallel form. Perplexity: each text is cut "
        "into consecutive windows of 512 tokens that do not overlap, as it stands and without "
        "BOS; each window predicts all its tokens but the first. Bits per byte compare across "
        "tokenizers. Tasks: prompts and metrics are those of the lm-eval harness; acc_norm "
        "divides log-likelihoods by characters. In brackets stands the 95 % confidence interval, "
        "of accuracies Wilson's; a task's perplexity is of the last words only. Texts have none: "
        "their windows are no sample.",
        tuple(tables),
        notes=tuple(said),
    )


def _texts(files: dict[str, Any]) -> Table:
    rows: list[Row] = []
    for name, file in files.items():
        ours, theirs = file["student"], file["teacher"] or {}
        rows.append(
            (
                name,
                number(ours.get("perplexity")),
                number(theirs.get("perplexity")),
                number(file["ratio"], 3, " ×"),
                number(ours.get("bits_per_byte")),
                number(theirs.get("bits_per_byte")),
                count(ours.get("tokens", theirs.get("tokens"))),
            )
        )
    return Table(
        (
            "text", "perplexity, student", "teacher", "ratio", "bits/byte, student", "teacher",
            "tokens",
        ),
        tuple(rows),
        "Perplexity of texts",
    )  # fmt: skip


def _tasks(files: dict[str, Any]) -> Table:
    rows: list[Row] = []
    for name, file in files.items():
        ours, theirs = measured(file["student"]), measured(file["teacher"])
        some = ours or theirs
        for metric in some["intervals"] if some else ():
            rows.append(
                (
                    f"{name}: {metric}",
                    _metric(ours, metric),
                    _metric(theirs, metric),
                    count(some["examples"] if some else None),
                )
            )
    return Table(("task and metric", *_MODELS, "examples"), tuple(rows), "Tasks")


def _metric(result: dict[str, Any] | None, metric: str) -> Cell:
    if result is None:
        return number(None)
    value, interval = result["metrics"][metric], result["intervals"][metric]
    if metric == "perplexity":
        return number(value) if interval is None else spread(value, *interval)
    return share(value, interval)


def layer_errors(record: dict[str, Any]) -> Section:
    """The transfer error of each linear layer."""
    section = record["layer_errors"]
    how = (
        "Every linear mixer receives the teacher's own input, so that errors do not add up from "
        "layer to layer. The error is the squared difference of the two mixers' outputs over the "
        "mean square of the teacher's: 0 is the transformer's output, 1 is as far from it as an "
        "output of zeros. It is what the stage transfer trains on, in float32, in parallel form."
    )
    if "not_measured" in section:
        return Section("layers", "Error of each layer", how, notes=reasons(section))
    return Section(
        "layers",
        "Error of each layer",
        f"{how} Measured on {section['sequences']} × {section['length']} tokens of "
        f"{section['text']}.",
        (_layer_table(section),),
        (Figure(figures.layer_errors(section), "A bar for each linear layer; dotted: the mean."),),
    )


def _layer_table(section: dict[str, Any]) -> Table:
    """Ten layers a row."""
    errors = {one["layer"]: one["error"] for one in section["layers"]}
    rows: list[Row] = [
        (
            f"{first} + ...",
            *(number(errors.get(first + offset), 3) for offset in range(_LAYERS_A_ROW)),
        )
        for first in range(0, max(errors) + 1, _LAYERS_A_ROW)
    ]
    rows.append(("mean", number(section["mean"], 3), *[""] * (_LAYERS_A_ROW - 1)))
    offsets = tuple(str(offset) for offset in range(_LAYERS_A_ROW))
    return Table(("layer", *offsets), tuple(rows), "Error of each layer, ten a row")


def training(record: dict[str, Any]) -> Section:
    """The run's curves."""
    section = record["training"]
    how = (
        "From the run's own metrics.jsonl. Each stage has a loss of its own, so that stages do "
        "not compare with each other; held-out perplexity is that of the run's held-out "
        "sequences, in the run's precision."
    )
    if "not_measured" in section:
        return Section("training", "The uptraining run", how, notes=reasons(section))
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
    tables = [
        Table(("stage and its loss", "steps", "tokens at its end", "first loss", "last loss"),
              tuple(rows), "Stages")
    ]  # fmt: skip
    if section["held_out"]:
        tables.append(_held_out(section))
    averaged = max(stage["steps_per_point"] for stage in section["stages"])
    if averaged > 1:
        how += f" Points and the losses below are means of up to {averaged} steps."
    beside = "" if section["teacher_perplexity"] is None else " beside the run's teacher's (dashed)"
    caption = f"The loss of each stage, and the held-out perplexity{beside}."
    return Section(
        "training", "The uptraining run", how, tuple(tables),
        (Figure(figures.training(section), caption),),
    )  # fmt: skip


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
    return Table(("held-out text of the run", "perplexity"), tuple(rows), "Held-out perplexity")


def positions(record: dict[str, Any]) -> Section:
    """Perplexity by position."""
    section = record["positions"]
    trained = record["training"].get("sequence_length")
    found = {role: measured(section[role]) for role in _MODELS}
    how = (
        "Each sequence is fed from its beginning through the model's state (the teacher's: its KV "
        "cache), and the loss is averaged over the positions of a bin, whose bounds double; a "
        "point stands at its bin's geometric middle. Whether perplexity goes on falling says "
        "whether more context is used. The teacher is measured up to its "
        "max_position_embeddings. Intervals are 95 %, from the standard error over tokens."
    )
    if found["student"] is None:
        return Section("positions", "Perplexity by position", how, notes=reasons(section))
    tables = tuple(_position_table(curve, found["teacher"]) for curve in found["student"]["curves"])
    return Section(
        "positions", "Perplexity by position", f"{how} Text: {found['student']['text']}.", tables,
        (Figure(figures.positions(section, trained), "Bars show 95 % intervals."),),
        notes=reasons(section),
    )  # fmt: skip


def _position_table(curve: dict[str, Any], teacher: dict[str, Any] | None) -> Table:
    theirs = {}
    for other in teacher["curves"] if teacher else ():
        if other["length"] == curve["length"]:
            theirs = {(one["first"], one["stop"]): one for one in other["bins"]}
    rows: list[Row] = []
    for one in curve["bins"]:
        beside = theirs.get((one["first"], one["stop"]))
        rows.append(
            (
                f"{one['first']:,} to {one['stop'] - 1:,}",
                spread(one["perplexity"], one["low"], one["high"], 3),
                spread(beside["perplexity"], beside["low"], beside["high"], 3)
                if beside
                else number(None),
                count(one["tokens"]),
            )
        )
    caption = f"Sequences of {curve['length']:,} tokens ({curve['sequences']} of them)"
    return Table(("positions", *_MODELS, "tokens"), tuple(rows), caption)


_VARIANTS = {
    "whole": "whole",
    "without_window": "without its window: linear attention only",
    "window_alone": "its window alone: softmax over the last tokens only",
}


def variants(record: dict[str, Any]) -> Section:
    """A windowed model taken apart."""
    section = record["variants"]
    how = (
        "The same weights with one part taken away, without any training for it. Without its "
        "window, every token gets the linear weight that tokens before the window have, and the "
        "sink is scaled along; with its window alone, nothing older than the window has a weight, "
        "nor has the sink. How far a part alone is from the whole says how much the model "
        "lives on the other one."
    )
    if "not_measured" in section:
        return Section("variants", "Window and linear part", how, notes=reasons(section))
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
    return Section(
        "variants", "Window and linear part",
        f"{how} Perplexity as above, of {section['text']}.", (Table(columns, tuple(rows)),),
    )  # fmt: skip
