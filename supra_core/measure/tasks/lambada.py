"""The last word of a passage (arXiv 1606.06031)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from supra_core.measure.scoring import Pair, Score, encode_pair
from supra_core.measure.tasks.examples import ContinuationTask, mean, text_field
from supra_core.text import ModelTokenizer


@dataclass(frozen=True)
class Passage:
    """A context and the word that ends it."""

    context: str
    continuation: str


class Lambada(ContinuationTask):
    """How often greedy decoding finds the last word, and the perplexity of it."""

    name = "lambada"
    fields = ("context", "continuation")
    text_form = "context, a space, last word"

    def example(self, item: dict[str, Any], place: str) -> Passage:
        return Passage(*(text_field(item, field, place) for field in self.fields))

    def pairs(self, tokenizer: ModelTokenizer, examples: Sequence[Passage]) -> list[Pair]:
        return [encode_pair(tokenizer, one.context, " " + one.continuation) for one in examples]

    def metrics(self, examples: Sequence[Passage], scores: Sequence[Score]) -> dict[str, float]:
        accuracy, accuracy_error = mean([float(found.greedy) for found in scores])
        nats, nats_error = mean([-found.log_likelihood for found in scores])
        perplexity = math.exp(min(nats, 700.0))
        return {
            "acc": accuracy,
            "acc_stderr": accuracy_error,
            "perplexity": perplexity,
            # The first order of exp around the mean.
            "perplexity_stderr": perplexity * nats_error,
        }
