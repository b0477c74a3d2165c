"""The sections about behaviour: recall, letters, answers, and what the model costs."""

from __future__ import annotations

from typing import Any

from supra_cli.report_card import figures
from supra_cli.report_card.parts import (
    ABSENT,
    Answer,
    Cell,
    Figure,
    Row,
    Section,
    Table,
    count,
    measured,
    reasons,
    share,
    size,
    spread,
)

_MODELS = ("student", "teacher")


def recall(record: dict[str, Any]) -> Section:
    """Associative recall and copying by distance."""
    sections = {"recall": record["recall"], "copying": record["copying"]}
    sequences = record["settings"]["sequences"]
    how = (
        "Recall: eight lines 'key: value' of random words, then running text, then one of the "
        "keys again: its value is right. Copying: sixteen random words, running text, then the "
        "same words again: after two of them, each next word is right. The distance counts tokens "
        "from a word to the place where it has to come again: a window of as many tokens just "
        "reaches it. 'Among candidates': the right word is likelier than the other seven values, "
        "or than the words still to be repeated; chance is the share of a blind guess. 'Greedy': "
        "it is the likeliest of the whole vocabulary, where chance is "
        f"close to 0. {sequences} seeded sequences stand behind each distance, the same for both "
        "models where they share a tokenizer; words are single tokens, and a sequence begins with "
        "what the tokenizer puts in front of a text. Distances that do not fit into the model's "
        "positions are left out. Intervals are 95 % (Wilson), as if the answers of one sequence "
        "did not depend on each other."
    )
    titles = {"recall": "Recall of a value by its key", "copying": "Copying of random words"}
    tables = tuple(
        _distance_table(section, titles[key])
        for key, section in sections.items()
        if any(measured(section[role]) for role in _MODELS)
    )
    drawn: tuple[Figure, ...] = ()
    if tables:
        caption = "Bars show 95 % intervals; dotted: chance."
        drawn = (Figure(figures.distances(**sections), caption),)
    notes = tuple(dict.fromkeys(note for s in sections.values() for note in reasons(s)))
    return Section("recall", "Recall by distance", how, tables, drawn, notes=notes)


def _distance_table(section: dict[str, Any], title: str) -> Table:
    found: dict[str, dict[int, Any]] = {}
    by_chance = ABSENT
    for role in _MODELS:
        result = measured(section[role])
        found[role] = {one["distance"]: one for one in result["distances"]} if result else {}
        if result:
            by_chance = share(result["by_chance"])
    rows: list[Row] = []
    for distance in sorted({d for results in found.values() for d in results}):
        ours = [found[role].get(distance) for role in _MODELS]
        rows.append(
            (
                f"{distance:,}",
                *(share(one["among"], one["among_interval"]) if one else ABSENT for one in ours),
                by_chance,
                *(share(one["greedy"], one["greedy_interval"]) if one else ABSENT for one in ours),
                count(next(one["answers"] for one in ours if one)),
            )
        )
    return Table(
        (
            "distance, tokens", "among candidates, student", "teacher", "chance", "greedy, student",
            "teacher", "answers",
        ),
        tuple(rows),
        title,
    )  # fmt: skip


def permutations(record: dict[str, Any]) -> Section:
    """Whether a content is chosen, or a letter."""
    section = record["permutations"]
    found = {role: measured(section[role]) for role in _MODELS}
    how = (
        "Each question is asked with its choices lettered, once for each rotation of a seeded "
        "order, so that every content stands at every letter once; the likeliest letter after "
        "'Answer:' is the model's. Consistent: the same content in every order, which a model "
        "that always says one letter never is. Without preference every letter is chosen as often "
        "as the column says. Small models are close to chance here, transformers too. The "
        "interval is 95 % (Wilson)."
    )
    if not any(found.values()):
        notes = tuple(dict.fromkeys(reasons(section)))
        return Section("permutations", "Order of the choices", how, notes=notes)
    some = found["student"] or found["teacher"]
    assert some is not None
    rows: list[Row] = [
        (
            "the same content in every order",
            *(
                share(one["consistent"], one["consistent_interval"]) if one else ABSENT
                for one in found.values()
            ),
            share(some["by_chance"]),
        ),
        (
            "right, over all orders",
            *(share(one["accuracy"]) if one else ABSENT for one in found.values()),
            share(some["accuracy_by_chance"]),
        ),
    ]
    for place, letter in enumerate(some["letters"]):
        chosen = (
            share(one["letters"][place]["chosen"]) if one else ABSENT for one in found.values()
        )
        rows.append((f"letter {letter['letter']} chosen", *chosen, share(letter["even"])))
    return Section(
        "permutations", "Order of the choices",
        f"{how} {some['questions']} questions of {some['file']}, {some['orders']} prompts.",
        (Table(("", *_MODELS, "without preference"), tuple(rows)),),
        (Figure(figures.letters(section), "Dotted: how often without preference."),),
        notes=reasons(section),
    )  # fmt: skip


def samples(record: dict[str, Any]) -> Section:
    """Answers to plain questions, and how many loop."""
    section = record["samples"]
    found = {role: result for role in _MODELS if (result := measured(section[role]))}
    how = "Plain questions, answered greedily and at temperature 0.8 with a seed for each."
    if not found:
        return Section("samples", "Answers that loop", how, notes=reasons(section))
    some = next(iter(found.values()))
    forms = "; ".join(f"{role}: {result['prompt_form']}" for role, result in found.items())
    how += (
        f" At most {some['answer_tokens']} tokens each. Prompt: {forms}. By rule, {some['rule']}. "
        "Intervals are 95 % (Wilson)."
    )
    rows: list[Row] = []
    for place, rate in enumerate(some["rates"]):
        ours = [found[role]["rates"][place] if role in found else None for role in _MODELS]
        rows.append(
            (
                f"looping at temperature {rate['temperature']:g}",
                *(share(one["looping"], one["interval"]) if one else ABSENT for one in ours),
                count(rate["answers"]),
            )
        )
    return Section(
        "samples", "Answers that loop", how,
        (Table(("", *_MODELS, "answers"), tuple(rows)),), answers=_answers(found),
        notes=reasons(section),
    )  # fmt: skip


def _answers(found: dict[str, dict[str, Any]]) -> tuple[Answer, ...]:
    """Each question once for each temperature, what the models said beside each other."""
    groups = zip(*(result["answers"] for result in found.values()), strict=True)
    return tuple(
        Answer(
            f"{answers[0]['question']} (temperature {answers[0]['temperature']:g})",
            tuple(
                (role, answer["text"], answer["loops"])
                for role, answer in zip(found, answers, strict=True)
            ),
        )
        for answers in groups
    )


def cost(record: dict[str, Any]) -> Section:
    """Memory and speed."""
    memory, speed = record["memory"], record["speed"]
    found = {role: measured(speed[role]) for role in _MODELS}
    how = (
        "Memory is computed from the shapes, for one sequence: the state of linear attention in "
        "float32, keys and values of windows and caches in 16 bit. Speed is measured on this "
        "machine, beside whatever else ran on it, on random tokens of one sequence: the median of "
        "the repetitions, in brackets the slowest and the fastest. Prefill computes the logits of "
        "all its tokens; decode is one step, one token. In torch a step copies a cache that grows, "
        "which an engine made for transformers need not."
    )
    tables = [] if measured(memory) is None else [_memory_table(memory)]
    if any(found.values()):
        tables.append(_speed_table(found))
    if measured(memory) is None:
        notes = (*reasons(memory), *reasons(speed))
        return Section("cost", "Memory and speed", how, tuple(tables), notes=notes)
    even = memory["break_even_tokens"]
    said = "is never smaller" if even is None else f"is the smaller one from {even:,} tokens on"
    caption = f"Both axes are logarithmic. This model's state {said}."
    return Section(
        "cost", "Memory and speed", how, tuple(tables),
        (Figure(figures.memory(memory), caption),), notes=reasons(speed),
    )  # fmt: skip


def _memory_table(memory: dict[str, Any]) -> Table:
    rows: tuple[Row, ...] = tuple(
        (
            f"{one['context']:,} tokens",
            size(one["student_bytes"]),
            size(one["transformer_bytes"]),
        )
        for one in memory["contexts"]
    )
    return Table(
        ("context", "this model's state", "transformer's KV cache"), rows, "Memory for one sequence"
    )


def _speed_table(found: dict[str, dict[str, Any] | None]) -> Table:
    """By context: a model with few positions is timed after fewer tokens than the other."""
    timed = [
        {one["context"]: one for one in result["contexts"]} if result else {}
        for result in found.values()
    ]
    rows: list[Row] = [
        (
            f"{kind} {join} {context:,} tokens",
            *(_rate(contexts.get(context), kind) for contexts in timed),
        )
        for kind, join in (("prefill", "of"), ("decode", "after"))
        for context in sorted({context for contexts in timed for context in contexts})
    ]
    return Table(("tokens a second", *_MODELS), tuple(rows), "Speed")


def _rate(timed: dict[str, Any] | None, kind: str) -> Cell:
    if timed is None:
        return ABSENT
    return spread(timed[kind], timed[f"{kind}_slowest"], timed[f"{kind}_fastest"], 3)
