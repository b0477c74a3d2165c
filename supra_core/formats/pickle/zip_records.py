"""Where the records of an uncompressed zip archive lie, as PyTorch writes its checkpoints.

Nothing is extracted: a record is a range of bytes, and its name only a key. The whole directory is
checked before any record is read: each record is stored uncompressed (so none unpacks into more
than the file), lies inside the file, overlaps no other, has a unique, plain relative name, and
repeats in its own header what the directory says. Layout: PKWARE's APPNOTE 6.3, sections 4.3 and
4.5.3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from supra_core.errors import FormatError
from supra_core.formats.inside import open_regular

# Records of an archive, and bytes of its directory.
RECORDS = 250_000
DIRECTORY_BYTES = 64_000_000

_END = struct.Struct("<4s4H2LH")
_END_64_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_COMMENT = 65_535
_SIZES_16, _SIZES_32 = 0xFFFF, 0xFFFFFFFF
_EXTRA_64 = 1
_STORED = 0
_ENCRYPTED = 1
_NO_ARCHIVE = "truncated, or not a PyTorch checkpoint: get the file again"


@dataclass(frozen=True)
class Record:
    """A range of bytes; ``crc`` is the CRC-32 that the directory states for it."""

    offset: int
    size: int
    crc: int


def read_records(path: Path) -> dict[str, Record]:
    """Name -> where the record lies; :class:`FormatError` for an archive that is not as above."""
    try:
        with open_regular(path) as file:
            content, begin, count = _directory(file)
            found = list(_entries(file, content, begin))
        _require(len(found) == count)
        records: dict[str, Record] = {}
        reached = 0
        for _, name, record in found:
            _require(name not in records, f"zip entry {name} is there twice: refused")
            records[name] = record
        for header_at, _, record in sorted(found, key=lambda entry: entry[0]):
            _require(header_at >= reached, "zip entries overlap: refused")
            reached = record.offset + record.size
        return records
    except (struct.error, UnicodeDecodeError):
        raise FormatError(f"{path}: {_NO_ARCHIVE}") from None
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def _require(condition: bool, problem: str = _NO_ARCHIVE) -> None:
    if not condition:
        raise ValueError(problem)


def _directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """The directory's bytes, where they begin, and how many entries it states."""
    start = max(file.seek(0, 2) - _COMMENT - _END.size, 0)
    file.seek(start)
    tail = file.read(_COMMENT + _END.size)
    found = tail.rfind(b"PK\5\6")
    _require(found >= 0)
    *_, count, length, begin, _ = _END.unpack_from(tail, found)
    end = start + found
    if count == _SIZES_16 or _SIZES_32 in (length, begin):
        count, length, begin, end = _directory_64(file, end)
    _require(
        count <= RECORDS and count * _ENTRY.size <= length <= DIRECTORY_BYTES,
        f"a zip directory of {count} entries in {length} bytes: refused",
    )
    _require(begin + length <= end)
    file.seek(begin)
    content = file.read(length)
    _require(len(content) == length)
    return content, begin, count


def _directory_64(file: BinaryIO, end: int) -> tuple[int, int, int, int]:
    """The same sizes of an archive whose numbers do not fit the short record."""
    at = end - _END_64_LOCATOR.size
    _require(at >= 0)
    file.seek(at)
    magic, _, place, _ = _END_64_LOCATOR.unpack(file.read(_END_64_LOCATOR.size))
    _require(magic == b"PK\6\7" and place + _END_64.size <= at)
    file.seek(place)
    magic, *_, count, length, begin = _END_64.unpack(file.read(_END_64.size))
    _require(magic == b"PK\6\6")
    return count, length, begin, place


def _entries(file: BinaryIO, content: bytes, limit: int) -> Iterator[tuple[int, str, Record]]:
    """For each entry where its own header begins, its name and its record."""
    at = 0
    while at < len(content):
        (magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length,
         comment_length, _, _, _, header_at) = _ENTRY.unpack_from(content, at)  # fmt: skip
        at += _ENTRY.size
        raw, extra = content[at : at + name_length], content[at + name_length :][:extra_length]
        at += name_length + extra_length + comment_length
        _require(magic == b"PK\1\2" and at <= len(content))
        name = raw.decode("utf-8")
        inside = name and not name.startswith("/") and ".." not in name.split("/")
        _require(
            bool(inside) and "\\" not in name and "\0" not in name,
            f"zip entry '{name}' leaves its folder: refused",
        )
        _require(
            method == _STORED and not flags & _ENCRYPTED,
            f"zip entry {name} is compressed or encrypted, unlike PyTorch's: save it again",
        )
        size, packed, header_at = _long_numbers(extra, [size, packed, header_at])
        _require(size == packed and header_at + _LOCAL.size <= limit)
        offset = _data_offset(file, header_at, name, raw)
        _require(offset + size <= limit, f"truncated at {name}: get the file again")
        yield header_at, name, Record(offset, size, crc)


def _long_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """``numbers`` with those that did not fit 32 bits taken from the extra field, in order."""
    at = 0
    while _SIZES_32 in numbers:
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == _EXTRA_64:
            long = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            found = [next(long, -1) if n == _SIZES_32 else n for n in numbers]
            if -1 not in found:
                return found
    return numbers


def _data_offset(file: BinaryIO, header_at: int, name: str, raw: bytes) -> int:
    """Where the bytes of an entry begin, behind its own header."""
    file.seek(header_at)
    magic, _, _, method, *_, name_length, extra_length = _LOCAL.unpack(file.read(_LOCAL.size))
    _require(
        magic == b"PK\3\4" and method == _STORED and file.read(name_length) == raw,
        f"damaged zip entry {name}: get it again",
    )
    return header_at + _LOCAL.size + int(name_length) + int(extra_length)
