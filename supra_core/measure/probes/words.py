"""Words that are one token each, to build probes from with any tokenizer."""

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
            f"the tokenizer has {len(others)} tokens to make probes from, and {fewest} are needed"
        )
    return np.array(others, dtype=np.int64), False


def _is_word(token: str) -> bool:
    word = token[1:]
    return (
        token.startswith(_SPACES)
        and len(word) in _LETTERS
        and word.isascii()
        and word.isalpha()
        and word.islower()
    )
