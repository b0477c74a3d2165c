"""Seeded answers to plain questions, and which of them loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from supra_cli.evaluation.sides import Side
from supra_cli.report_card.settings import Budget
from supra_core.measure.intervals import of_share
from supra_core.measure.probes.loops import RULE, check_loops
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend
from supra_core.runtime.sampling import Sampling, generate
from supra_core.text.chat_template import ANSWER

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "What does a doctor do?",
    "Explain to a child what a computer is.",
    "Who wrote Romeo and Juliet?",
    "Give me two tips for sleeping better.",
    "Why do people keep cats?",
    "Describe a walk through a forest.",
)
TEMPERATURES = (0.0, 0.8)

Prompter = Callable[[str], list[int]]


def sample(
    side: Side, model: Backend, budget: Budget, seed: int, progress: Progress
) -> dict[str, Any]:
    """Every question answered at both temperatures; answers, and the share that loops."""
    form, prompt_of = _prompter(side)
    asked = QUESTIONS[: budget.questions]
    answers: list[dict[str, Any]] = []
    total = len(asked) * len(TEMPERATURES)
    for temperature in TEMPERATURES:
        for number, question in enumerate(asked):
            progress(side.stage("samples"), len(answers), total)
            sampling = Sampling(
                temperature, max_tokens=budget.answer_tokens, seed=(seed + number) % 2**32
            )
            tokens = list(generate(model, prompt_of(question), sampling))
            answers.append(
                {
                    "question": question,
                    "temperature": temperature,
                    "text": side.tokenizer.decode(tokens).strip(),
                    **asdict(check_loops(tokens)),
                }
            )
    progress(side.stage("samples"), total, total)
    return {
        "prompt_form": form,
        "rule": RULE,
        "answer_tokens": budget.answer_tokens,
        "rates": [_rate(answers, temperature) for temperature in TEMPERATURES],
        "answers": answers,
    }


def _rate(answers: list[dict[str, Any]], temperature: float) -> dict[str, Any]:
    ours = [answer["loops"] for answer in answers if answer["temperature"] == temperature]
    return {
        "temperature": temperature,
        "answers": len(ours),
        "looping": sum(ours) / len(ours),
        "interval": of_share(sum(ours), len(ours)),
    }


def _prompter(side: Side) -> tuple[str, Prompter]:
    """How a question becomes tokens: by the chat template where the model has one."""
    tokenizer = side.tokenizer
    if tokenizer.template is not None:
        return (
            "the model's chat template",
            lambda question: tokenizer.render([{"role": "user", "content": question}], ANSWER),
        )
    return (
        "'Question: ...', a line 'Answer:' (the model has no chat template here), "
        + tokenizer.leading_form,
        lambda question: tokenizer.encode_prompt(f"Question: {question}\nAnswer:"),
    )
