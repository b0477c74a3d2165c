"""Text from others made safe to print: characters that control a terminal become escapes."""

from __future__ import annotations

from unicodedata import category

_LINES = "\n\t"
# They join letters and emoji, and do not move the cursor.
_JOINERS = "\u200c\u200d"
# Spaces of every width, private characters, and those that are newer than this Python's tables.
_KEPT_KINDS = ("Zs", "Co", "Cn")


def visible(text: str, *, lines: bool = False) -> str:
    """``text`` with an escape such as ``\\x1b`` for every control character.

    These include line breaks, half surrogates, and marks that change the direction of text.
    ``lines``: keep line breaks and tabs.
    """
    if text.isprintable():
        return text
    kept = _JOINERS + _LINES if lines else _JOINERS
    text = text.replace("\r\n", "\n") if lines else text
    return "".join(
        c if c.isprintable() or c in kept or category(c) in _KEPT_KINDS else ascii(c)[1:-1]
        for c in text
    )
