"""What stands beside figures: their intervals, and notes on how far they compare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from supra_core.measure.intervals import around, of_share
from supra_core.model.sizes import Sizes

Interval = tuple[float, float]


def memory(sizes: Sizes, contexts: Iterable[int], model: str) -> list[dict[str, int]]:
    """Bytes of a sequence by its tokens: of the model, under its name, and of a transformer."""
    return [
        {
            "context": context,
            f"{model}_bytes": sizes.memory_bytes(context),
            "transformer_bytes": sizes.transformer_memory_bytes(context),
        }
        for context in contexts
    ]


def intervals(record: dict[str, Any]) -> dict[str, Interval | None]:
    """The 95 % interval of each metric that has a standard error; None for a single example.

    Wilson's for a share, around the logarithm for a perplexity.
    """
    metrics = record["metrics"]
    return {
        name: _interval(name, value, metrics[f"{name}_stderr"], record["examples"])
        for name, value in metrics.items()
        if f"{name}_stderr" in metrics
    }


def _interval(metric: str, value: float, error: float, examples: int) -> Interval | None:
    if metric.startswith("acc"):
        return of_share(round(value * examples), examples)
    if examples < 2 or not math.isfinite(value):
        return None
    # The error of a perplexity is that of its logarithm times itself.
    low, high = around(math.log(value), error / value)
    return math.exp(low), math.exp(min(high, 700.0))


def notes(name: str, role: str, record: dict[str, Any] | None) -> list[str]:
    """What has to be known of a model's figures before they are compared."""
    found, record = [], record or {}
    if not record.get("same_tokens", True):
        found.append(
            f"{name}: the {role}'s tokenizer divides the text into other tokens; both models read "
            "the same characters, and only bits per byte compare"
        )
    if positions := record.get("beyond_positions"):
        found.append(
            f"{name}: the {role} is a transformer of {positions:,} positions, and the windows are "
            "longer"
        )
    if cut := record.get("cut_prompts"):
        found.append(
            f"{name}: {cut:,} prompts are longer than the positions of the {role}, which did not "
            "read their beginning"
        )
    return found
