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
    share,
    size,
    some,
    spread,
)

_DISTANCES = {"recall": "Recall of a value by its key", "copying": "Copying of random words"}


def recall(record: dict[str, Any]) -> Section:
    """Associative recall and copying by distance."""
    sections = {key: record[key] for key in _DISTANCES}
    how = (
        "Recall: eight lines 'key: value' of random words, then running text, then one of the "
        "keys again: its value is right. Copying: sixteen random words, running text, then the "
        "same words again: after two of them, each next word is right. The distance counts tokens "
        "from a word to the place where it has to come again: a window of as many tokens just "
        "reaches it. 'Among candidates': the right word is likelier than the other seven values, "
        "or than the words still to be repeated; chance is the share of a blind guess. 'Greedy': "
        "it is the likeliest of the whole vocabulary, where chance is close to 0. "
        f"{record['settings']['sequences']} seeded sequences stand behind each distance, the same "
        "for both models where they share a tokenizer; words are single tokens, and a sequence "
        "begins with what the tokenizer puts in front of a text. Distances that do not fit into "
        "the model's positions are omitted. Intervals are 95 % (Wilson), as if the answers of one "
        "sequence did not depend on each other."
    )
    tables = [
        _distance_table(found, _DISTANCES[key])
        for key, section in sections.items()
        if (found := found_of(section))
    ]
    caption = "Bars show 95 % intervals; dotted: chance."
    drawn = [Figure(figures.distances(**sections), caption)] if tables else []
    notes = dict.fromkeys(note for section in sections.values() for note in reasons(section))
    return Section("recall", "Recall by distance", how, Content(tables, drawn), list(notes))


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


@part(
    "permutations",
    "Order of the choices",
    "permutations",
    "Each question is asked with its choices lettered, once for each rotation of a seeded "
    "order, so that every content stands at every letter once; the likeliest letter after "
    "'Answer:' is the model's. Consistent: the same content in every order, which a model "
    "that always says one letter never is. Without preference every letter is chosen as often "
    "as the column says. Small models are close to chance here, transformers too. The "
    "interval is 95 % (Wilson).",
)
def permutations(section: dict[str, Any], found: Found, _: dict[str, Any]) -> Content:
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
        more=f"{first['questions']} questions of {first['file']}, {first['orders']} prompts.",
    )


@part(
    "samples",
    "Answers that loop",
    "samples",
    "Plain questions, answered greedily and at temperature 0.8 with a seed for each.",
)
def samples(_: dict[str, Any], found: Found, __: dict[str, Any]) -> Content:
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
        more=f"At most {first['answer_tokens']} tokens each. Prompt: {forms}. By rule, "
        f"{first['rule']}. Intervals are 95 % (Wilson).",
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
    how = (
        "Memory is computed from the shapes, for one sequence: the state of linear attention in "
        "float32, keys and values of windows and caches in 16 bit. Speed is measured on this "
        "machine, beside whatever else ran on it, on random tokens of one sequence: the median of "
        "the repetitions, in brackets the slowest and the fastest. Prefill computes the logits of "
        "all its tokens; decode is one step, one token. In torch a step copies a cache that grows, "
        "which an engine made for transformers need not."
    )
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
    return Section("cost", "Memory and speed", how, Content(tables, drawn), notes)


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
