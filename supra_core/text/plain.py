"""Plain text: one form of line ends and no byte order mark, whatever program wrote the file."""

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
    """``text`` with ``\\n`` at every line's end and without a byte order mark."""
    text = text.lstrip(BOM)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def fault(text: str) -> str | None:
    """Why ``text`` is not valid, for errors; None if it is."""
    if "\0" in text:
        return "holds a NUL character, which text cannot have"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not a character"
    return None


def other_code(begin: bytes) -> str | None:
    """UTF-16 or UTF-32, if a file begins with its byte order mark."""
    return next((name for bom, name in _OTHER_CODES.items() if begin.startswith(bom)), None)
