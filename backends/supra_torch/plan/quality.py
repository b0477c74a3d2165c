"""Quality of measured runs, as a hint for a planned one.

Nothing is extrapolated: one small model was measured, and others may learn at another rate. The
figures are perplexities relative to the transformer's, from docs/results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Measured:
    """A run's perplexity relative to its teacher's, in windows of 512 tokens, recurrent form.

    ``outside``: WikiText-2's validation set, unlike the training text; ``inside``: held-out text
    of the training domain.
    """

    recipe: str
    tokens: int
    outside: float
    inside: float
    record: str
    model: str = "SmolLM2-135M-Instruct"


MEASURED = (
    Measured("windowed", 30_720, 1.85, 1.28, "docs/results/recipes"),
    Measured("windowed", 301_056, 1.19, 1.04, "docs/results/smollm2-windowed-301k"),
    Measured("windowed", 6_000_000, 1.16, 0.98, "docs/results/smollm2-h200"),
    Measured("pure", 30_720, 7.58, 2.25, "docs/results/recipes"),
    Measured("pure", 401_408, 3.37, 1.36, "docs/results/smollm2-pure-401k"),
    Measured("pure", 1_800_192, 2.73, 1.21, "docs/results/smollm2-pure-1800k"),
    Measured("pure", 3_000_320, 2.26, 1.19, "docs/results/smollm2-pure-3m"),
    Measured("lolcats", 30_720, 2.77, 1.68, "docs/results/recipes"),
    Measured("paper", 30_720, 331, 82.0, "docs/results/recipes"),
)


def nearest(recipe: str, tokens: int) -> Measured | None:
    """The measured run of a recipe with the nearest number of tokens, by ratio; None if none."""
    runs = [run for run in MEASURED if run.recipe == recipe]
    return min(runs, key=lambda run: abs(math.log(run.tokens / tokens)), default=None)
