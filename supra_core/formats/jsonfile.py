"""JSON files that hold one object, read with an error that names the file.

What is read may be a stranger's: size and depth are bounded before the parser sees them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError
from supra_core.formats.inside import read_bytes

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
    return object_of(read_bytes(path, limit), str(path))


def object_of(content: bytes, where: str) -> dict[str, Any]:
    """The object that ``content`` holds; ``where`` names its file in a :class:`FormatError`."""
    try:
        value = parse(content)
    except ValueError as error:
        raise FormatError(f"{where} is not valid JSON ({error}): get the file again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} must hold a JSON object: get the file again")
    return value


def parse(
    content: bytes | str,
    *,
    depth: int = DEPTH,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value of a JSON text; ValueError if it is not JSON or nests deeper than ``depth``.

    ``pairs`` makes an object from its members, as in :func:`json.loads`.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if _deeper(data, depth):
        raise ValueError(f"more than {depth} levels deep")
    value = json.loads(data.decode("utf-8"), object_pairs_hook=pairs)
    if b"\\ud" in data or b"\\uD" in data:
        # Half of a pair is not a character: such text can be neither hashed nor written.
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is not a character") from None
    return value


def reason(error: ValueError) -> str:
    """Why :func:`parse` refused a line, without the position, which would seem a file's line."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    # The text after a semicolon is advice to programmers.
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]


def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``pairs`` of :func:`parse`: an object whose names differ; else ValueError."""
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a name is there twice in one object")
    return found


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """``value`` as an indented JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as :func:`json_bytes` has it."""
    path.write_bytes(json_bytes(value))


def _deeper(data: bytes, depth: int) -> bool:
    """Whether brackets stand more than ``depth`` deep outside strings; linear in ``data``."""
    if data.count(b"[") + data.count(b"{") <= depth:
        return False
    level = 0
    for token in _TOKENS.finditer(data):
        level += (token[0] in (b"[", b"{")) - (token[0] in (b"]", b"}"))
        if level > depth:
            return True
    return False
