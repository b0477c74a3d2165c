"""What generated sequences are made of: words of one token each, and running text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How byte-level BPE and SentencePiece write the space before a word.
_SPACES = ("Ġ", "▁")
_LETTERS = range(3, 11)
# The lowest ids are the earliest merges, hence the commonest words.
COMMONEST = 2000
_SENTENCES = 3000
# A sentence takes one part of each line.
_PARTS = (
    "The old carpenter|A young teacher|The baker's daughter|My neighbour|The night guard|A sailor",
    " from the valley| in a grey coat|, as always,| with two friends|, after lunch,| all alone",
    " carried| repaired| looked for| described| sold| forgot",
    " a wooden chair| the broken lamp| a box of letters| the green boat| an old map| some apples",
    " in the market| behind the school| on the last train| before the storm| at the river| at home",
)


def word_tokens(
    tokenizer: Tokenizer, vocab_size: int, fewest: int = 64
) -> tuple[npt.NDArray[np.int64], bool]:
    """Ids of common lower-case words that are one token with the space before them.

    Where there are fewer than ``fewest``, ids of any tokens that are not special, and False
    beside them. Raises :class:`SupraError` when there are not even so many of these.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    known = {token: index for token, index in vocabulary.items() if index < vocab_size}
    words = sorted(index for token, index in known.items() if _is_word(token))[:COMMONEST]
    if len(words) >= fewest:
        return np.array(words, dtype=np.int64), True
    special = {
        index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    others = sorted(index for index in known.values() if index not in special)[:COMMONEST]
    if len(others) < fewest:
        raise SupraError(
            f"the tokenizer has {len(others)} usable tokens, and a task needs {fewest}"
        )
    return np.array(others, dtype=np.int64), False


def running_text() -> str:
    """The same plain sentences on every machine, about 200,000 characters."""
    parts = [line.split("|") for line in _PARTS]
    sizes = [len(choices) for choices in parts]
    drawn = np.random.default_rng(0).integers(sizes, size=(_SENTENCES, len(sizes)))
    return " ".join(
        "".join(choices[place] for choices, place in zip(parts, row, strict=True)) + "."
        for row in drawn
    )


def _is_word(token: str) -> bool:
    word = token[1:]
    return (
        token.startswith(_SPACES)
        and len(word) in _LETTERS
        and word.isascii()
        and word.isalpha()
        and word.islower()
    )
