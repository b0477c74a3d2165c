"""Whether a model chooses a content or a letter: the same choices, lettered in every rotation.

Each question is asked once for each of its choices, so that every content stands at every letter
exactly once. A model that always answers one letter then chooses each content once and is never
consistent; one that knows its answer always is (the order effect of arXiv 2309.03882).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from supra_core.errors import SupraError
from supra_core.measure.intervals import of_share
from supra_core.measure.scoring import encode_pair, like_lengths, padded
from supra_core.measure.tasks.multiple_choice import Question, QuestionTask
from supra_core.measure.tasks.task import Int64, Measure, Options, Record, Subject
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend, Form, check_ids
from supra_core.text import ModelTokenizer

_TEXT_FORM = "query, a line 'A. choice' for each choice, 'Answer:', a space, letter"
_BATCH_TOKENS = 1024
_LETTERS = string.ascii_uppercase
# The tokens of a question, and for each letter the token that tells it from the others.
Prompt = tuple[list[int], list[int]]


class Permutations(QuestionTask):
    """Every question in every rotation of its choices, from a seeded first order.

    ``consistent``: share of the questions for which every order chose the same content;
    ``by_chance``: that share for random letters. ``accuracy``: share of all orders in which the
    right content was chosen. ``letters``: how often each was chosen, and how often ``even`` choice
    would choose it. The interval is 95 % (Wilson, over questions).
    """

    name = "permutations"

    def prepared(self, content: Sequence[Question], subject: Subject, options: Options) -> Measure:
        questions, positions = content[: options.limit], subject.spec.max_position_embeddings
        generator = np.random.default_rng(options.seed)
        orders = [_rotations(generator, len(question.choices)) for question in questions]
        prompts = [
            _prompt(subject.tokenizer, question, order)
            for question, rotations in zip(questions, orders, strict=True)
            for order in rotations
        ]
        for prompt, letters in prompts:
            check_ids(np.array(prompt + letters), subject.spec.vocab_size)
        longest = max(len(prompt) for prompt, _ in prompts)
        if longest > positions:
            raise SupraError(
                f"a question with its choices takes {longest} tokens and the model has "
                f"{positions} positions: remove it"
            )

        def measure(model: Backend, progress: Progress, stage: str) -> Record:
            chosen = iter(_chosen(model, prompts, subject.form, progress, stage))
            letters = [[next(chosen) for _ in rotations] for rotations in orders]
            return {
                **_record(questions, orders, letters),
                "text_form": f"{_TEXT_FORM}; {subject.tokenizer.leading_form}",
                "seed": options.seed,
            }

        return measure

    def conditions(self, record: Record) -> str:
        return (
            f"{record['questions']:,} questions, {record['orders']:,} prompts, {record['form']} "
            f"form, seed {record['seed']}; random letters: consistent {record['by_chance']:.4f}, "
            f"accuracy {record['accuracy_by_chance']:.4f}; {record['text_form']}"
        )


def _rotations(generator: np.random.Generator, count: int) -> list[Int64]:
    """All rotations of one random order of ``count`` choices."""
    first = generator.permutation(count)
    return [np.roll(first, shift) for shift in range(count)]


def _prompt(tokenizer: ModelTokenizer, question: Question, order: Int64) -> Prompt:
    """SupraError where the tokenizer has no token that tells the letters apart."""
    lettered = zip(_LETTERS, order, strict=False)
    lines = "".join(f"{letter}. {question.choices[content]}\n" for letter, content in lettered)
    context = question.query.rstrip("\n") + "\n" + lines + "Answer:"
    pairs = [encode_pair(tokenizer, context, " " + letter) for letter in _LETTERS[: len(order)]]
    prompt = list(pairs[0].context)
    rests = [list(pair.continuation) for pair in pairs]
    # A tokenizer may write the space as a token of its own.
    while all(rests) and len({rest[0] for rest in rests}) == 1:
        prompt.append(rests[0][0])
        rests = [rest[1:] for rest in rests]
    first = [rest[0] for rest in rests if rest]
    alike = all(pair.context == pairs[0].context for pair in pairs)
    if len(set(first)) < len(order) or not alike:
        raise SupraError("the tokenizer has no tokens of their own for the letters of the choices")
    return prompt, first


def _chosen(
    model: Backend, prompts: Sequence[Prompt], form: Form, progress: Progress, stage: str
) -> list[int]:
    """The index of the likeliest letter of each prompt."""
    chosen, done = [0] * len(prompts), 0
    for batch in like_lengths([len(prompt) for prompt, _ in prompts], _BATCH_TOKENS):
        progress(stage, done, len(prompts))
        logits = model.logits(padded([prompts[index][0] for index in batch]), form=form)
        for row, index in enumerate(batch):
            prompt, letters = prompts[index]
            chosen[index] = int(logits[row, len(prompt) - 1, letters].argmax())
        done += len(batch)
    progress(stage, done, len(prompts))
    return chosen


def _record(
    questions: Sequence[Question], orders: Sequence[list[Int64]], letters: Sequence[list[int]]
) -> dict[str, Any]:
    """``letters``: the one chosen in each order of each question."""
    contents = [
        [int(order[letter]) for order, letter in zip(rotations, chosen, strict=True)]
        for rotations, chosen in zip(orders, letters, strict=True)
    ]
    same = sum(len(set(chosen)) == 1 for chosen in contents)
    right = sum(
        chosen.count(question.gold) for question, chosen in zip(questions, contents, strict=True)
    )
    # A question of n choices is asked n times: its letters evenly, and right by 1 / n by chance.
    sizes = [len(question.choices) for question in questions]
    flat = [letter for chosen in letters for letter in chosen]
    return {
        "metrics": {"consistent": same / len(questions), "accuracy": right / len(flat)},
        "questions": len(questions),
        "orders": len(flat),
        "consistent_interval": of_share(same, len(questions)),
        "by_chance": float(np.mean([float(n) ** (1 - n) for n in sizes])),
        "accuracy_by_chance": len(questions) / len(flat),
        "letters": [
            {
                "letter": _LETTERS[letter],
                "chosen": flat.count(letter) / len(flat),
                "even": sum(n > letter for n in sizes) / len(flat),
            }
            for letter in range(max(sizes))
        ],
    }
