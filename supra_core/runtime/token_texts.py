"""The text of single tokens, and where each begins in the whole text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Decode = Callable[[Sequence[int]], str]

# Stands for bytes that are not a whole character; a character has at most four bytes.
UNKNOWN = "\ufffd"
_CHARACTER = 4
# Some tokenizers drop a space at the beginning of a text: these ids stand before every other.
_BEFORE = "a"


def decode_within(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids as it is in the middle of a text, special tokens by their names."""
    before = tokenizer.encode(_BEFORE, add_special_tokens=False).ids
    known = tokenizer.decode(before, skip_special_tokens=False)
    return tokenizer.decode([*before, *ids], skip_special_tokens=False)[len(known) :]


class Places:
    """Where tokens begin in their text, one after the other; several may share a character."""

    def __init__(self, decode: Decode, start: int = 0) -> None:
        self._decode = decode
        # Characters of the whole tokens, and the ids of the character that is begun.
        self.text, self._start, self._begun = "", start, list[int]()

    def take(self, token: int) -> int:
        """The character at which ``token`` begins."""
        place = self._start + len(self.text)
        self._begun.append(token)
        text = self._decode(self._begun)
        if not text.endswith(UNKNOWN) or len(self._begun) >= _CHARACTER:
            self.text += text
            self._begun.clear()
        return place

    def rest(self) -> str:
        """The whole text, bytes of an incomplete character included."""
        return self.text + (self._decode(self._begun) if self._begun else "")
