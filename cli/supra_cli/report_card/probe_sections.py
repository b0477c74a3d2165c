"""The sections about behaviour: recall, letters, answers, and what the model costs."""

from __future__ import annotations

from functools import partial
from typing import Any

from supra_cli.report_card import figures
from supra_cli.report_card.parts import (
    MODELS,
    Answer,
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
    measured,
    part,
    reasons,
    section_of,
    share,
    size,
    some,
    spread,
)

_DISTANCES = {"recall": "Recall of a value by its key", "copying": "Copying of random words"}


def recall(record: dict[str, Any]) -> Section:
    """Associative recall and copying by distance."""
    sections = {key: record[key] for key in _DISTANCES}
    tables = [
        _distance_table(found, _DISTANCES[key])
        for key, one in sections.items()
        if (found := found_of(one))
    ]
    caption = "Bars show 95 % intervals; dotted: chance."
    drawn = [Figure(figures.distances(**sections), caption)] if tables else []
    notes = [note for one in sections.values() for note in reasons(one)]
    return section_of("recall", Content(tables, drawn, fields=record["settings"]), notes)


def _distance_table(found: Found, title: str) -> Table:
    by_chance = [share(result["by_chance"]) for result in found.values()][-1]
    rows: list[Row] = [
        (
            f"{distance:,}",
            *cells(ours, lambda one: share(one["among"], one["among_interval"])),
            by_chance,
            *cells(ours, lambda one: share(one["greedy"], one["greedy_interval"])),
            count(some(ours)["answers"]),
        )
        for (distance,), ours in grouped(found, "distances", "distance")
    ]
    columns = (
        "distance, tokens", "among candidates, student", "teacher", "chance", "greedy, student",
        "teacher", "answers",
    )  # fmt: skip
    return Table(columns, rows, title)


@part("permutations", "permutations")
def permutations(section: dict[str, Any], found: Found) -> Content:
    """Whether a content is chosen, or a letter."""
    first = some(found)
    rows: list[Row] = [
        (
            "the same content in every order",
            *cells(found, lambda one: share(one["consistent"], one["consistent_interval"])),
            share(first["by_chance"]),
        ),
        (
            "right, over all orders",
            *cells(found, lambda one: share(one["accuracy"])),
            share(first["accuracy_by_chance"]),
        ),
    ]
    for place, letter in enumerate(first["letters"]):
        chosen = {role: one["letters"][place] for role, one in found.items()}
        shown = cells(chosen, lambda one: share(one["chosen"]))
        rows.append((f"letter {letter['letter']} chosen", *shown, share(letter["even"])))
    return Content(
        [Table(("", *MODELS, "without preference"), rows)],
        [Figure(figures.letters(section), "Dotted: how often without preference.")],
        fields=first,
    )


@part("samples", "samples")
def samples(_: dict[str, Any], found: Found) -> Content:
    """Answers to plain questions, and how many loop."""
    first = some(found)
    forms = "; ".join(f"{role}: {result['prompt_form']}" for role, result in found.items())
    rows: list[Row] = []
    for place, rate in enumerate(first["rates"]):
        ours = {role: result["rates"][place] for role, result in found.items()}
        looping = cells(ours, lambda one: share(one["looping"], one["interval"]))
        title = f"looping at temperature {rate['temperature']:g}"
        rows.append((title, *looping, count(rate["answers"])))
    return Content(
        [Table(("", *MODELS, "answers"), rows)],
        answers=_answers(found),
        fields={**first, "forms": forms},
    )


def _answers(found: Found) -> list[Answer]:
    """Each question once for each temperature, what the models said beside each other."""
    return [
        Answer(
            f"{answers[0]['question']} (temperature {answers[0]['temperature']:g})",
            tuple(
                (role, answer["text"], answer["loops"])
                for role, answer in zip(found, answers, strict=True)
            ),
        )
        for answers in zip(*(result["answers"] for result in found.values()), strict=True)
    ]


def cost(record: dict[str, Any]) -> Section:
    """Memory and speed."""
    memory, speed = record["memory"], found_of(record["speed"])
    tables, drawn = [], []
    if measured(memory):
        even = memory["break_even_tokens"]
        said = "is never smaller" if even is None else f"is the smaller one from {even:,} tokens on"
        caption = f"Both axes are logarithmic. This model's state {said}."
        tables.append(_memory_table(memory))
        drawn.append(Figure(figures.memory(memory), caption))
    if speed:
        tables.append(_speed_table(speed))
    notes = (*(() if drawn else reasons(memory)), *reasons(record["speed"]))
    return section_of("cost", Content(tables, drawn), notes)


def _memory_table(memory: dict[str, Any]) -> Table:
    rows: list[Row] = [
        (
            f"{one['context']:,} tokens",
            size(one["student_bytes"]),
            size(one["transformer_bytes"]),
        )
        for one in memory["contexts"]
    ]
    columns = ("context", "this model's state", "transformer's KV cache")
    return Table(columns, rows, "Memory for one sequence")


def _speed_table(found: Found) -> Table:
    """By context: a model with few positions is timed after fewer tokens than the other."""

    def rate(timed: dict[str, Any], kind: str) -> Cell:
        return spread(timed[kind], timed[f"{kind}_slowest"], timed[f"{kind}_fastest"], 3)

    rows: list[Row] = [
        (f"{kind} {join} {context:,} tokens", *cells(timed, partial(rate, kind=kind)))
        for kind, join in (("prefill", "of"), ("decode", "after"))
        for (context,), timed in grouped(found, "contexts", "context")
    ]
    return Table(("tokens a second", *MODELS), rows, "Speed")
