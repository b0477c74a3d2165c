"""Text that others wrote, made harmless to show: what would steer a terminal becomes visible."""

from __future__ import annotations

from unicodedata import category

_LINES = "\n\t"
# They join letters and emoji, and move nothing.
_JOINERS = "\u200c\u200d"
# Spaces of every width, private characters, and those that are newer than this Python's tables.
_KEPT_KINDS = ("Zs", "Co", "Cn")


def visible(text: str, *, lines: bool = False) -> str:
    """``text`` with an escape such as ``\\x1b`` for every control.

    Those are line breaks and what steers a terminal, but also half surrogates, and what turns the
    direction of the text after it. ``lines``: of a text of several lines, whose breaks and tabs
    stay.
    """
    if text.isprintable():
        return text
    kept = _JOINERS + _LINES if lines else _JOINERS
    text = text.replace("\r\n", "\n") if lines else text
    return "".join(
        c if c.isprintable() or c in kept or category(c) in _KEPT_KINDS else ascii(c)[1:-1]
        for c in text
    )
