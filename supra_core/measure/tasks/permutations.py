"""Whether a model chooses a content or a letter: the same choices, lettered in every rotation.

Each question is asked once for each of its choices, so that every content stands at every letter
exactly once. A model that always answers one letter then chooses each content once and is never
consistent; one that knows its answer always is (the order effect of arXiv 2309.03882).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.measure.intervals import of_share
from supra_core.measure.scoring import encode_pair, like_lengths, padded
from supra_core.measure.tasks import Question
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Form, check_ids

if TYPE_CHECKING:
    from supra_core.text import ModelTokenizer

TEXT_FORM = "query, a line 'A. choice' for each choice, 'Answer:', a space, letter"
_BATCH_TOKENS = 1024
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LetterShare:
    """How often a letter was chosen, and how often without preference it would be."""

    letter: str
    chosen: float
    even: float


@dataclass(frozen=True)
class PermutationConsistency:
    """``consistent``: share of the questions for which every order chose the same content.

    ``by_chance``: that share for letters drawn at random. ``accuracy``: share of all orders in
    which the right content was chosen, ``accuracy_by_chance`` likewise. Intervals are 95 %
    (Wilson, over questions).
    """

    questions: int
    orders: int
    consistent: float
    consistent_interval: tuple[float, float]
    by_chance: float
    accuracy: float
    accuracy_by_chance: float
    letters: tuple[LetterShare, ...]


def option_permutations(
    model: Backend,
    tokenizer: ModelTokenizer,
    questions: Sequence[Question],
    *,
    form: Form = "parallel",
    seed: int = 0,
    progress: Progress = silent,
    stage: str = "permutations",
) -> PermutationConsistency:
    """Every question in every rotation of its choices, from a seeded first order.

    Raises :class:`SupraError` when a prompt exceeds the model's max_position_embeddings or the
    tokenizer has no token that tells the letters apart, or tokens that the model does not have.
    """
    generator = np.random.default_rng(seed)
    orders = [_orders(generator, len(question.choices)) for question in questions]
    asked = [
        _asked(tokenizer, question, order)
        for question, rotations in zip(questions, orders, strict=True)
        for order in rotations
    ]
    for prompt, letters in asked:
        check_ids(np.array(prompt + letters), model.spec.vocab_size)
    longest = max(len(prompt) for prompt, _ in asked)
    if longest > model.spec.max_position_embeddings:
        raise SupraError(
            f"a question with its choices takes {longest} tokens and the model has "
            f"{model.spec.max_position_embeddings} positions: leave it out"
        )
    chosen = iter(_chosen(model, asked, form, progress, stage))
    answers = [[next(chosen) for _ in rotations] for rotations in orders]
    return _result(questions, orders, answers)


def _orders(generator: np.random.Generator, count: int) -> list[Int64]:
    """All rotations of one random order of ``count`` choices."""
    first = generator.permutation(count)
    return [np.roll(first, shift) for shift in range(count)]


def _asked(
    tokenizer: ModelTokenizer, question: Question, order: Int64
) -> tuple[list[int], list[int]]:
    """The prompt's tokens, and for each letter the token that tells it from the others."""
    lines = "".join(
        f"{letter}. {question.choices[content]}\n"
        for letter, content in zip(string.ascii_uppercase, order, strict=False)
    )
    context = question.query.rstrip("\n") + "\n" + lines + "Answer:"
    pairs = [
        encode_pair(tokenizer, context, " " + letter)
        for letter in string.ascii_uppercase[: len(order)]
    ]
    prompt = list(pairs[0].context)
    rests = [list(pair.continuation) for pair in pairs]
    # A tokenizer may write the space as a token of its own.
    while all(rests) and len({rest[0] for rest in rests}) == 1:
        prompt.append(rests[0][0])
        rests = [rest[1:] for rest in rests]
    first = [rest[0] for rest in rests if rest]
    if len(set(first)) < len(order) or any(
        list(p.context) != list(pairs[0].context) for p in pairs
    ):
        raise SupraError("the tokenizer has no tokens of their own for the letters of the choices")
    return prompt, first


def _chosen(
    model: Backend,
    asked: Sequence[tuple[list[int], list[int]]],
    form: Form,
    progress: Progress,
    stage: str,
) -> list[int]:
    """The index of the likeliest letter of each prompt."""
    chosen = [0] * len(asked)
    done = 0
    for batch in like_lengths([len(prompt) for prompt, _ in asked], _BATCH_TOKENS):
        progress(stage, done, len(asked))
        logits = model.logits(padded([asked[index][0] for index in batch]), form=form)
        for row, index in enumerate(batch):
            prompt, letters = asked[index]
            chosen[index] = int(logits[row, len(prompt) - 1, letters].argmax())
        done += len(batch)
    progress(stage, done, len(asked))
    return chosen


def _result(
    questions: Sequence[Question], orders: Sequence[list[Int64]], answers: Sequence[list[int]]
) -> PermutationConsistency:
    """``answers``: the letter chosen in each order of each question."""
    contents = [
        [int(order[letter]) for order, letter in zip(rotations, letters, strict=True)]
        for rotations, letters in zip(orders, answers, strict=True)
    ]
    same = sum(len(set(chosen)) == 1 for chosen in contents)
    right = sum(
        content == question.gold
        for question, chosen in zip(questions, contents, strict=True)
        for content in chosen
    )
    sizes = [len(question.choices) for question in questions]
    total = sum(sizes)
    return PermutationConsistency(
        questions=len(questions),
        orders=total,
        consistent=same / len(questions),
        consistent_interval=of_share(same, len(questions)),
        by_chance=float(np.mean([float(n) ** (1 - n) for n in sizes])),
        accuracy=right / total,
        # A question of n choices is asked n times, each time right by 1 / n.
        accuracy_by_chance=len(questions) / total,
        letters=_letters(sizes, answers),
    )


def _letters(sizes: Sequence[int], answers: Sequence[list[int]]) -> tuple[LetterShare, ...]:
    flat = [letter for chosen in answers for letter in chosen]
    # A question of n choices is asked n times: each of its letters once, without preference.
    return tuple(
        LetterShare(
            string.ascii_uppercase[letter],
            flat.count(letter) / len(flat),
            sum(n > letter for n in sizes) / len(flat),
        )
        for letter in range(max(sizes))
    )
