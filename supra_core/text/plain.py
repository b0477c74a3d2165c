"""What counts as the text of a file: the same characters whatever wrote them.

A line ends with a line feed, a carriage return or both, and a byte order mark is no part of it.
"""

from __future__ import annotations

import codecs

BOM = "\ufeff"
_OTHER_CODES = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def plain(text: str) -> str:
    """``text`` with ``\\n`` at every line's end and without a byte order mark in front."""
    text = text.lstrip(BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def fault(text: str) -> str | None:
    """Why ``text`` is none, for errors; None if it is one."""
    if "\0" in text:
        return "holds a NUL character, which is in no text"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a pair of surrogates, which is no character"
    return None


def other_code(begin: bytes) -> str | None:
    """UTF-16 or UTF-32, if the first bytes of a file say that it is written so."""
    return next((name for bom, name in _OTHER_CODES.items() if begin.startswith(bom)), None)
