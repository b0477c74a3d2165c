"""The values of a JSON file, one at a time: the file may be larger than memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO

_CHUNK = 1_000_000
# A string with or without its end, matched without backtracking; a bracket; a comma.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>")?|[\[\]{},]', re.DOTALL)
_ARRAY = re.compile(rb"\s*\[\s*(?=[\[{])")


def values(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each value's line, from 1, and bytes: the members of an array of objects or arrays.

    Any other file is one value, or several in a row as in JSON lines. The bytes need not be JSON.
    Raises EOFError when the array has no end.
    """
    data = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
    while not data.strip(b" \t\r\n[") and (more := stream.read(_CHUNK)):
        data += more
    array = _ARRAY.match(data)
    # Open brackets around a value, all open brackets; where the value begins.
    around = depth = 1 if array else 0
    begin = scanned = array.end() if array else 0
    line = 1 + data.count(b"\n", 0, begin)
    while True:
        found = _TOKENS.search(data, scanned)
        if found is None or (found[0][:1] == b'"' and not found["end"]):
            # Double what there is, so that a long value is not searched over and over.
            more = stream.read(max(_CHUNK, len(data) - begin))
            if not more:
                break
            scanned = (found.start() if found else len(data)) - begin
            data, begin = data[begin:] + more, 0
            continue
        token, scanned = found[0], found.end()
        depth += (token in b"[{") - (token in b"]}")
        if around and token == b"]" and depth == 0:
            own, around = data[begin : found.start()], 0
        elif around and token == b"," and depth == 1:
            own = data[begin : found.start()]
            own = own if own.strip() else token
        elif token in b"]}" and depth <= around:
            if around and depth == around:
                continue
            # An extra bracket stays, so that the value is not JSON.
            own, depth = data[begin:scanned], around
        else:
            continue
        if own.strip():
            yield line + _blank_lines(own), own
        line += data.count(b"\n", begin, scanned)
        begin = scanned
    if around:
        raise EOFError("its array has no end")
    if data[begin:].strip():
        yield line + _blank_lines(data[begin:]), data[begin:]


def _blank_lines(value: bytes) -> int:
    return value.count(b"\n", 0, len(value) - len(value.lstrip()))
