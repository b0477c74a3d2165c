"""JSON files that hold one object, read with an error that names the file.

What is read may be a stranger's: size and depth are bounded before the parser sees them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError
from supra_core.formats.inside import open_regular
from supra_core.formats.lfs import refuse_pointer

# Bytes of a config; of an index of weights, which has a line for each tensor.
CONFIG_BYTES = 10_000_000
INDEX_BYTES = 100_000_000
# Objects and lists inside each other.
DEPTH = 64

# A string, ended or not, as one match that never goes back; or a bracket.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def read_object(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The object in ``path``; :class:`FormatError` if it is absent or holds something else.

    ``limit``: bytes above which the file is refused unread.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise FormatError(f"{path} cannot be read ({error}): check the path") from None
    refuse_pointer(path, content)
    if len(content) > limit:
        raise FormatError(f"{path} is larger than {limit:,} bytes: name the right file")
    try:
        value = parse(content)
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}): get the file again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object: get the file again")
    return value


def parse(
    content: bytes | str,
    *,
    depth: int = DEPTH,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """What JSON text holds; ValueError if it is none or nests deeper than ``depth``.

    ``pairs`` makes an object of its members, as in :func:`json.loads`.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if _deeper(data, depth):
        raise ValueError(f"more than {depth} levels deep")
    value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    if b"\\ud" in data or b"\\uD" in data:
        # Half of a pair is no character: what holds it could be neither hashed nor written.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a pair of surrogates is no character") from None
    return value


def reason(error: ValueError) -> str:
    """Why :func:`parse` refused a line, without the place inside it, which is no line of a file."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    # What follows a semicolon is advice to who writes programs.
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]


def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``pairs`` of :func:`parse`: an object whose names differ; else ValueError."""
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a name is there twice in one object")
    return found


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _deeper(data: bytes, depth: int) -> bool:
    """Whether brackets stand more than ``depth`` deep outside strings; linear in ``data``."""
    if data.count(b"[") + data.count(b"{") <= depth:
        return False
    level = 0
    for token in _TOKENS.finditer(data):
        first = token[0][0]
        if first in b"[{":
            level += 1
            if level > depth:
                return True
        elif first in b"]}":
            level -= 1
    return False
