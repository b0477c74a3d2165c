"""Tasks over local files: the last word of a passage, and multiple choice.

One JSON object a line. ``lambada``: context, continuation. ``multiple_choice``: query, choices,
gold. Prompts and metrics are the lm-eval harness's for lambada_openai, arc_easy and piqa, so
that the figures compare: a space stands before every continuation, and a query is followed by
"Answer:".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.data.documents import refuse_records
from supra_core.errors import FormatError
from supra_core.formats.jsonfile import parse, reason
from supra_core.measure.scoring import DEFAULT_BATCH_TOKENS, Pair, encode_pair, score
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form
from supra_core.text import ModelTokenizer, read_text

LAMBADA_FORM = "context, a space, last word"
CHOICE_FORM = "query, 'Answer:', a space, choice; acc_norm: log-likelihood over characters"


@dataclass(frozen=True)
class Passage:
    """A context and the word that ends it."""

    context: str
    continuation: str


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskResult:
    """Metrics by name, with the standard error of each as ``NAME_stderr``.

    ``records``: one object an example, in the file's order. ``cut_prompts``: how many were longer
    than the model's positions and lost their beginning.
    """

    metrics: dict[str, float]
    examples: int
    text_form: str
    records: tuple[dict[str, Any], ...]
    cut_prompts: int


def lambada(
    model: Backend,
    tokenizer: ModelTokenizer,
    passages: Sequence[Passage],
    *,
    form: Form = "parallel",
    max_length: int = 2048,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress = silent,
    stage: str = "lambada",
) -> TaskResult:
    """How often greedy decoding finds the last word, and its perplexity (arXiv 1606.06031)."""
    pairs = passage_pairs(tokenizer, passages)
    scores = score(
        model, pairs, form=form, max_length=max_length, batch_tokens=batch_tokens,
        progress=progress, stage=stage,
    )  # fmt: skip
    accuracy, accuracy_error = _mean([float(found.greedy) for found in scores])
    nats, nats_error = _mean([-found.log_likelihood for found in scores])
    perplexity = math.exp(min(nats, 700.0))
    metrics = {
        "acc": accuracy,
        "acc_stderr": accuracy_error,
        "perplexity": perplexity,
        # The first order of exp around the mean.
        "perplexity_stderr": perplexity * nats_error,
    }
    records = tuple(
        {"right": found.greedy, "log_likelihood": found.log_likelihood} for found in scores
    )
    form_of_text = f"{LAMBADA_FORM}; {tokenizer.leading_form}"
    cut = sum(len(pair) > max_length for pair in pairs)
    return TaskResult(metrics, len(scores), form_of_text, records, cut)


def passage_pairs(tokenizer: ModelTokenizer, passages: Sequence[Passage]) -> list[Pair]:
    """What :func:`lambada` scores; SupraError for a passage that cannot be."""
    return [encode_pair(tokenizer, p.context, " " + p.continuation) for p in passages]


def question_pairs(tokenizer: ModelTokenizer, questions: Sequence[Question]) -> list[Pair]:
    """What :func:`multiple_choice` scores, choice by choice; SupraError likewise."""
    return [
        encode_pair(tokenizer, question.query + "Answer:", " " + choice)
        for question in questions
        for choice in question.choices
    ]


def multiple_choice(
    model: Backend,
    tokenizer: ModelTokenizer,
    questions: Sequence[Question],
    *,
    form: Form = "parallel",
    max_length: int = 2048,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Progress = silent,
    stage: str = "multiple_choice",
) -> TaskResult:
    """How often the likeliest choice is right: ``acc``, and ``acc_norm`` a character."""
    pairs = question_pairs(tokenizer, questions)
    scores = iter(
        score(
            model,
            pairs,
            form=form,
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=progress,
            stage=stage,
        )  # fmt: skip
    )
    records = []
    for question in questions:
        likelihoods = [next(scores).log_likelihood for _ in question.choices]
        normalised = [x / len(c) for x, c in zip(likelihoods, question.choices, strict=True)]
        records.append(
            {
                "gold": question.gold,
                "chosen": int(np.argmax(likelihoods)),
                "chosen_norm": int(np.argmax(normalised)),
                "log_likelihoods": likelihoods,
            }
        )
    metrics = {}
    for name, key in (("acc", "chosen"), ("acc_norm", "chosen_norm")):
        right = [float(record[key] == record["gold"]) for record in records]
        metrics[name], metrics[f"{name}_stderr"] = _mean(right)
    form_of_text = f"{CHOICE_FORM}; {tokenizer.leading_form}"
    cut = sum(len(pair) > max_length for pair in pairs)
    return TaskResult(metrics, len(records), form_of_text, tuple(records), cut)


def task_of(path: Path) -> str:
    """Which task a file is for: ``perplexity`` for text; a .jsonl file says it by its fields."""
    if path.suffix.lower() != ".jsonl":
        refuse_records(path)
        return "perplexity"
    _, first = _objects(path, 1)[0]
    if {"query", "choices", "gold"} <= first.keys():
        return "multiple_choice"
    if {"context", "continuation"} <= first.keys():
        return "lambada"
    raise FormatError(
        f"{path}: its first line has fields {', '.join(first)}: a task needs context and "
        "continuation, or query, choices and gold"
    )


def read_passages(path: Path, limit: int | None = None) -> list[Passage]:
    """The first ``limit`` lines of a lambada file; FormatError names the line and the field."""
    return [
        Passage(_text(item, "context", place), _text(item, "continuation", place))
        for place, item in _placed(path, limit)
    ]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` lines of a multiple-choice file; FormatError as for passages."""
    return [_question(item, place) for place, item in _placed(path, limit)]


def _question(item: dict[str, Any], place: str) -> Question:
    choices, gold = item.get("choices"), item.get("gold")
    if not isinstance(choices, list) or len(choices) < 2:
        raise FormatError(f"{place}: field choices must be a list of at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise FormatError(f"{place}: field choices has an entry that is no text: correct it")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise FormatError(f"{place}: field gold must be an index into choices, not {gold!r}")
    return Question(_text(item, "query", place), tuple(choices), gold)


def _text(item: dict[str, Any], field: str, place: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        found = repr(value) if field in item else "absent"
        raise FormatError(f"{place}: field {field} must be a text, and is {found}")
    if not value.strip():
        raise FormatError(f"{place}: field {field} is empty: give it a text, or leave the line out")
    return value


def _placed(path: Path, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    """Objects with where they stand, for errors."""
    return [(f"{path}, line {number}", item) for number, item in _objects(path, limit)]


def _objects(path: Path, limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    """Each line's number, from 1, and object; blank lines are passed over."""
    items: list[tuple[int, dict[str, Any]]] = []
    # Not splitlines(), for which a line also ends at characters that stand in JSON texts.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if len(items) == limit:
            break
        if not line.strip():
            continue
        try:
            item = parse(line)
        except ValueError as error:
            raise FormatError(
                f"{path}, line {number} is not JSON ({reason(error)}): correct it"
            ) from None
        if not isinstance(item, dict):
            raise FormatError(f"{path}, line {number} is no JSON object: one example a line")
        items.append((number, item))
    if not items:
        raise FormatError(f"{path} holds no example: one JSON object a line")
    return items


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; one value has none, which is written as 0."""
    array = np.array(values)
    if len(array) < 2:
        return float(array.mean()), 0.0
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array)))
