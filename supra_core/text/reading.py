"""Text files."""

from __future__ import annotations

from pathlib import Path

from supra_core.errors import FormatError


def read_text(path: str | Path) -> str:
    """A UTF-8 file as one string; :class:`FormatError` if it is absent, empty or no text."""
    path = Path(path)
    try:
        # newline="" keeps the file's own line ends: they are part of what is measured.
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        reason = error.strerror or str(error)
        raise FormatError(f"{path} cannot be read ({reason}): name a text file") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None
    except ValueError as error:
        raise FormatError(f"{path} cannot be read ({error}): name a text file") from None
    if not text:
        raise FormatError(f"{path} is empty: name a file with text in it")
    return text
