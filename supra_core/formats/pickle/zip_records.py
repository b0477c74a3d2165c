"""Where the records of an uncompressed zip archive lie, as PyTorch writes its checkpoints.

Nothing is extracted: a record is a range of bytes, and its name only a key. The directory is
checked wholly before any record is read: that each one is stored as it is (so none unpacks into
more than the file), lies inside the file, overlaps no other, has a plain relative name that
stands once, and repeats in its own header what the directory says. Layout: PKWARE's APPNOTE 6.3,
sections 4.3 and 4.5.3.
"""

from __future__ import annotations

import struct
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


@dataclass(frozen=True)
class Record:
    """A range of bytes; ``crc`` is the CRC-32 that the directory states for it."""

    offset: int
    size: int
    crc: int


def read_records(path: Path) -> dict[str, Record]:
    """Name -> where the record lies; :class:`FormatError` for an archive that is not as above."""
    with open_regular(path) as file:
        size = file.seek(0, 2)
        content, directory_at, count = _directory(path, file, size)
        records: dict[str, Record] = {}
        ranges: list[tuple[int, int]] = []
        at = 0
        while at < len(content):
            at, name, record, header_at = _entry(path, file, content, at, directory_at)
            if name in records:
                raise FormatError(f"{path}: zip entry {name} is there twice: refused")
            records[name] = record
            ranges.append((header_at, record.offset + record.size))
    if len(records) != count:
        raise _no_archive(path)
    reached = 0
    for begin, end in sorted(ranges):
        if begin < reached:
            raise FormatError(f"{path}: zip entries overlap: refused")
        reached = end
    return records


def _directory(path: Path, file: BinaryIO, size: int) -> tuple[bytes, int, int]:
    """The directory's bytes, where they begin, and how many entries it states."""
    start = max(size - _COMMENT - _END.size, 0)
    file.seek(start)
    tail = file.read(_COMMENT + _END.size)
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) - found < _END.size:
        raise _no_archive(path)
    _, _, _, _, count, length, begin, _ = _END.unpack_from(tail, found)
    end = start + found
    if count == _SIZES_16 or _SIZES_32 in (length, begin):
        count, length, begin, end = _directory_64(path, file, end)
    if count > RECORDS or length > DIRECTORY_BYTES or length < count * _ENTRY.size:
        raise FormatError(f"{path}: a zip directory of {count} entries in {length} bytes: refused")
    if begin + length > end:
        raise _no_archive(path)
    file.seek(begin)
    content = file.read(length)
    if len(content) != length:
        raise _no_archive(path)
    return content, begin, count


def _directory_64(path: Path, file: BinaryIO, end: int) -> tuple[int, int, int, int]:
    """The same sizes of an archive whose numbers do not fit the short record."""
    at = end - _END_64_LOCATOR.size
    if at < 0:
        raise _no_archive(path)
    file.seek(at)
    magic, _, place, _ = _END_64_LOCATOR.unpack(file.read(_END_64_LOCATOR.size))
    if magic != b"PK\6\7" or place + _END_64.size > at:
        raise _no_archive(path)
    file.seek(place)
    magic, _, _, _, _, _, _, count, length, begin = _END_64.unpack(file.read(_END_64.size))
    if magic != b"PK\6\6":
        raise _no_archive(path)
    return count, length, begin, place


def _entry(
    path: Path, file: BinaryIO, content: bytes, at: int, limit: int
) -> tuple[int, str, Record, int]:
    """The next entry's place, this one's name and record, and where its own header begins."""
    if len(content) - at < _ENTRY.size:
        raise _no_archive(path)
    (magic, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length,
     comment_length, _, _, _, header_at) = _ENTRY.unpack_from(content, at)  # fmt: skip
    at += _ENTRY.size
    raw, extra = content[at : at + name_length], content[at + name_length :][:extra_length]
    at += name_length + extra_length + comment_length
    if magic != b"PK\1\2" or at > len(content):
        raise _no_archive(path)
    name = _name(path, raw)
    if method != _STORED or flags & _ENCRYPTED:
        raise FormatError(
            f"{path}: zip entry {name} is compressed or encrypted, which PyTorch does not do: save "
            "it again"
        )
    numbers = [size, packed, header_at]
    if _SIZES_32 in numbers:
        numbers = _long_numbers(path, extra, numbers)
    size, packed, header_at = numbers
    if size != packed or header_at + _LOCAL.size > limit:
        raise _no_archive(path)
    offset = _data_offset(path, file, header_at, name, raw)
    if offset + size > limit:
        raise FormatError(f"{path}: truncated at {name}: get the file again")
    return at, name, Record(offset, size, crc), header_at


def _name(path: Path, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _no_archive(path) from None
    if "\\" in name or "\0" in name or name.startswith("/") or ".." in name.split("/") or not name:
        raise FormatError(f"{path}: zip entry '{name}' leaves its folder: refused")
    return name


def _long_numbers(path: Path, extra: bytes, numbers: list[int]) -> list[int]:
    """``numbers`` with those that did not fit 32 bits taken from the extra field, in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        at += 4 + length
        if kind == _EXTRA_64:
            long = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            found = [next(long, -1) if n == _SIZES_32 else n for n in numbers]
            if -1 not in found:
                return found
    raise _no_archive(path)


def _data_offset(path: Path, file: BinaryIO, header_at: int, name: str, raw: bytes) -> int:
    """Where the bytes of an entry begin, behind its own header."""
    file.seek(header_at)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise _no_archive(path)
    magic, _, _, method, *_, name_length, extra_length = _LOCAL.unpack(header)
    if magic != b"PK\3\4" or method != _STORED or file.read(name_length) != raw:
        raise FormatError(f"{path}: damaged zip entry {name}: get it again")
    return header_at + _LOCAL.size + int(name_length) + int(extra_length)


def _no_archive(path: Path) -> FormatError:
    return FormatError(f"{path}: truncated, or no checkpoint of PyTorch: get the file again")
