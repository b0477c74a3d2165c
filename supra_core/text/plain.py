"""Plain text: one form of line ends and no byte order mark, whatever program wrote the file."""

from __future__ import annotations

import codecs
from pathlib import Path

from supra_core.errors import FormatError, reason

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


def read_text(path: str | Path) -> str:
    """A UTF-8 file as one :func:`plain` string; FormatError if it is absent, empty or not text."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if code := other_code(content):
            raise FormatError(f"{path} is {code}, not UTF-8: convert it first")
        text = plain(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({reason(error)}): name a text file") from None
    if not text:
        raise FormatError(f"{path} is empty: name a file with text in it")
    if wrong := fault(text):
        raise FormatError(f"{path} {wrong}: convert it first")
    return text
