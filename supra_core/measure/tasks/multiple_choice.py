"""Questions with choices, of which the likeliest is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from supra_core.errors import FormatError
from supra_core.measure.scoring import Pair, Score, encode_pair
from supra_core.measure.tasks.examples import ContinuationTask, ExampleTask, mean, text_field
from supra_core.text import ModelTokenizer


@dataclass(frozen=True)
class Question:
    """A question, its choices, and the index of the right one."""

    query: str
    choices: tuple[str, ...]
    gold: int


class QuestionTask(ExampleTask):
    """A task over questions."""

    fields = ("query", "choices", "gold")

    def example(self, item: dict[str, Any], place: str) -> Question:
        choices, gold = item.get("choices"), item.get("gold")
        if not isinstance(choices, list) or len(choices) < 2:
            raise FormatError(f"{place}: field choices must be a list of at least two texts")
        if not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise FormatError(f"{place}: field choices has an entry that is not a text: correct it")
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise FormatError(f"{place}: field gold must be an index into choices, not {gold!r}")
        return Question(text_field(item, "query", place), tuple(choices), gold)


class MultipleChoice(QuestionTask, ContinuationTask):
    """How often the likeliest choice is right: ``acc``, and ``acc_norm`` by character."""

    name = "multiple_choice"
    text_form = "query, 'Answer:', a space, choice; acc_norm: log-likelihood over characters"

    def pairs(self, tokenizer: ModelTokenizer, examples: Sequence[Question]) -> list[Pair]:
        return [
            encode_pair(tokenizer, question.query + "Answer:", " " + choice)
            for question in examples
            for choice in question.choices
        ]

    def metrics(self, examples: Sequence[Question], scores: Sequence[Score]) -> dict[str, float]:
        left = iter(scores)
        right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
        for question in examples:
            found = [next(left).log_likelihood for _ in question.choices]
            by_character = [x / len(c) for x, c in zip(found, question.choices, strict=True)]
            for name, values in (("acc", found), ("acc_norm", by_character)):
                right[name].append(float(np.argmax(values) == question.gold))
        metrics = {}
        for name, values in right.items():
            metrics[name], metrics[f"{name}_stderr"] = mean(values)
        return metrics
