"""Whether a generated text has fallen into a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

N = 4
# Below this share of different 4-grams a text mostly repeats itself (Rep-4 of arXiv 1908.04319).
LEAST_DISTINCT = 0.5
# A block that follows itself at once and at least twice covers more than this share.
MOST_REPEATED = 0.5
_REPETITIONS = 3
# Too short an answer can repeat nothing.
SHORTEST = 8

RULE = (
    f"a text of at least {SHORTEST} tokens loops when a block that stands {_REPETITIONS} times or "
    f"more in a row covers more than {100 * MOST_REPEATED:g} % of it, or when fewer than "
    f"{100 * LEAST_DISTINCT:g} % of its {N}-grams of tokens are different"
)


@dataclass(frozen=True)
class LoopCheck:
    """``distinct``: different 4-grams over all 4-grams; ``repeated``: share under one loop."""

    tokens: int
    distinct: float
    repeated: float
    loops: bool


def check_loops(tokens: Sequence[int]) -> LoopCheck:
    """The check of a text's token ids by :data:`RULE`."""
    distinct, repeated = distinct_share(tokens), repeated_share(tokens)
    long_enough = len(tokens) >= SHORTEST
    loops = long_enough and (repeated > MOST_REPEATED or distinct < LEAST_DISTINCT)
    return LoopCheck(len(tokens), distinct, repeated, loops)


def distinct_share(tokens: Sequence[int], n: int = N) -> float:
    """Different n-grams over all n-grams; 1 where there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repeated_share(tokens: Sequence[int]) -> float:
    """The share of the tokens under the longest run of one block three times or more in a row."""
    longest = 0
    for period in range(1, len(tokens) // _REPETITIONS + 1):
        run = 0
        for place in range(period, len(tokens)):
            run = run + 1 if tokens[place] == tokens[place - period] else 0
            if run >= (_REPETITIONS - 1) * period:
                longest = max(longest, run + period)
    return longest / len(tokens) if tokens else 0.0
