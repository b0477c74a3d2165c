"""Tokens to text as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Tokens of a prompt that its continuation is decoded with.
_CONTEXT = 16
# Replaces bytes that are not a whole character.
_UNKNOWN = "\ufffd"


class TextStream:
    """Decodes each token together with the piece before, whose text is known.

    Like tokenizers' DecodeStream, which fails where invalid bytes follow valid ones. ``decode``:
    tokens to text without special ones. ``after``: the tokens that the text continues; without
    them it begins a text, where some tokenizers drop a space.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = self._whole(list(after)[-_CONTEXT:])
        self._known, self._known_ids = self._decode(self._ids), len(self._ids)

    def take(self, token: int) -> str:
        """The text that became certain with ``token``; a character may span several tokens."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNKNOWN):
            # The next token may complete the character.
            return ""
        new_ids = self._ids[self._known_ids :]
        whole = text.startswith(self._known)
        piece = text[len(self._known) :] if whole else self._decode(new_ids)
        if piece:
            self._ids, self._known = new_ids, self._decode(new_ids)
            self._known_ids = len(new_ids)
        return piece

    def _whole(self, ids: list[int]) -> list[int]:
        """The last of ``ids`` that are whole characters; none where they end inside one."""
        for start in range(len(ids)):
            text = self._decode(ids[start:])
            if not text.startswith(_UNKNOWN) and not text.endswith(_UNKNOWN):
                return ids[start:]
        return []
