"""The values of a JSON file one by one, so that a file larger than memory can be read."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import IO

_CHUNK = 1_000_000
# A string, with its end if that is there, as one match that never goes back; a bracket; a comma.
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?P<end>")?|[\[\]{},]', re.DOTALL)
_ARRAY = re.compile(rb"\s*\[\s*(?=[\[{])")


def values(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Each value's line, from 1, and bytes: the members of an array of objects or arrays.

    Any other file is one value, or several that follow each other, as in JSON lines. The bytes
    may be no JSON. Raises EOFError when the array has no end.
    """
    data = stream.read(_CHUNK).removeprefix(codecs.BOM_UTF8)
    while not data.strip(b" \t\r\n[") and (more := stream.read(_CHUNK)):
        data += more
    array = _ARRAY.match(data)
    # Brackets that are open around a value, and all that are open; where the value begins.
    around = depth = 1 if array else 0
    begin = scanned = array.end() if array else 0
    line = 1 + data.count(b"\n", 0, begin)
    while True:
        found = _TOKENS.search(data, scanned)
        if found is None or (found[0][:1] == b'"' and not found["end"]):
            # As much again as there is: a long value is not searched over and over.
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
            # A bracket too many stays, so that the value is no JSON.
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
