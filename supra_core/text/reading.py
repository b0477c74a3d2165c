"""Text files, read with an error that names the file."""

from __future__ import annotations

from pathlib import Path

from supra_core.errors import FormatError, reason
from supra_core.text.plain import fault, other_code, plain


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
