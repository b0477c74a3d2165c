"""The header of a GGUF file: its metadata, and where each tensor lies.

Counts, lengths of strings and lists, extents and offsets are compared with the file's size before
anything is allocated. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from supra_core.errors import FormatError
from supra_core.formats.inside import open_regular, open_weights

# Limits: entries of metadata, and tensors.
ENTRIES = 65_536
TENSORS = 65_536
# Bytes of a key or a tensor's name, of a string (the longest is a chat template), and of a string
# in a list (a token or a merge).
NAME_BYTES = 1024
STRING_BYTES = 4_000_000
LISTED_STRING_BYTES = 8192
# Entries of all lists together, and bytes of the metadata.
LISTED = 4_000_000
METADATA_BYTES = 256_000_000
# Axes of a tensor in ggml.
RANK = 4
_LARGEST = 2**63 - 1

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT, _ALIGNMENT_KEY, _ALIGNMENT_LIMIT = 32, "general.alignment", 2**20
_STRING, _LIST = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_LENGTH = 8  # Bytes of the number before a string.


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies in the file; ``shape`` is row-major, ``kind`` the gguf package's type.

    ``byte_shape``: the shape in bytes, for types that store blocks.
    """

    path: Path
    kind: Any
    shape: tuple[int, ...]
    offset: int
    byte_shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata by key, tensors by name; :class:`FormatError` if the file is not what it claims."""
    try:
        with open_weights(path) as file:
            return _Reader(path, file, file.seek(0, 2)).header()
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: truncated or damaged GGUF file ({error}): get the file again"
        ) from None


def is_gguf(path: Path) -> bool:
    """Whether the content is GGUF, whatever the name: Ollama's files have no suffix."""
    try:
        with open_regular(path) as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError, FormatError):
        return False


class _Reader:
    """Reads the file from its beginning; ValueError if it is damaged."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.at = path, file, size, 0
        self.listed = 0
        file.seek(0)

    def header(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        if self.take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self.number("I")
        if version in (int.from_bytes(known.to_bytes(4, "big"), "little") for known in _VERSIONS):
            raise FormatError(
                f"{self.path} is a big-endian GGUF file, which is not supported: convert it with "
                "gguf-convert-endian, or get the little-endian file"
            )
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, known are 2 and 3")
        tensors, entries = self.number("Q"), self.number("Q")
        # The shortest tensor takes 32 bytes, the shortest entry 13.
        self.require(tensors <= TENSORS and 32 * tensors <= self.left, f"{tensors} tensors")
        self.require(entries <= ENTRIES and 13 * entries <= self.left, f"{entries} entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string(NAME_BYTES)
            self.require(key not in metadata, f"entry {key} is there twice")
            metadata[key] = self.value(self.number("I"))
            self.require(self.at <= METADATA_BYTES, f"more than {METADATA_BYTES:,} bytes before")
        stated = [self.tensor() for _ in range(tensors)]
        return metadata, self.placed(stated, _alignment(metadata))

    @property
    def left(self) -> int:
        """Bytes from here to the end of the file."""
        return self.size - self.at

    def require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise ValueError(problem)

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"{count} bytes at {self.at} of {self.size}")
        content = self.file.read(count)
        self.require(len(content) == count, "it became shorter")
        self.at += count
        return content

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self, limit: int) -> str:
        length = self.number("Q")
        self.require(length <= limit, f"a string of {length} bytes")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string(STRING_BYTES)
        if kind == _LIST:
            return self.values()
        self.require(kind in _NUMBERS, f"metadata of the unknown type {kind}")
        return self.number(_NUMBERS[kind])

    def values(self) -> list[Any]:
        kind, count = self.number("I"), self.number("Q")
        self.require(kind == _STRING or kind in _NUMBERS, f"a list of the unknown type {kind}")
        size = _LENGTH if kind == _STRING else struct.calcsize("<" + _NUMBERS[kind])
        self.listed += count
        self.require(self.listed <= LISTED and count * size <= self.left, f"a list of {count}")
        if kind == _STRING:
            return [self.string(LISTED_STRING_BYTES) for _ in range(count)]
        return [*struct.unpack(f"<{count}{_NUMBERS[kind]}", self.take(count * size))]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """The stated name, row-major shape, type and offset."""
        name = self.string(NAME_BYTES)
        rank = self.number("I")
        self.require(rank <= RANK, f"{name} has {rank} axes")
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        self.require(math.prod(shape) <= _LARGEST, f"{name} has shape {[*shape]}")
        return name, shape, self.number("I"), self.number("Q")

    def placed(
        self, stated: list[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, Stored]:
        """The tensors' places: aligned, inside the file and apart from each other."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        start = self.at + -self.at % alignment
        tensors: dict[str, Stored] = {}
        ranges = []
        for name, shape, number, offset in stated:
            self.require(name not in tensors, f"tensor {name} is there twice")
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
            row = shape[-1] if shape else 1
            self.require(row % block == 0, f"{name} has rows of {row}, not a multiple of {block}")
            self.require(offset % alignment == 0, f"{name} is not aligned")
            size = math.prod(shape) // block * block_bytes
            begin = start + offset
            self.require(begin + size <= self.size, f"{name} of {size} bytes ends past the file")
            ranges.append((begin, begin + size))
            byte_shape = (*shape[:-1], row // block * block_bytes)
            tensors[name] = Stored(self.path, kind, shape, begin, byte_shape)
        overlaps = any(end > begin for (_, end), (begin, _) in pairwise(sorted(ranges)))
        self.require(not overlaps, "tensors overlap")
        return tensors


def _alignment(metadata: dict[str, Any]) -> int:
    """Bytes of which each tensor's offset is a multiple: a power of two."""
    stated = metadata.get(_ALIGNMENT_KEY, _ALIGNMENT)
    if type(stated) is not int or not 0 < stated <= _ALIGNMENT_LIMIT or stated & (stated - 1):
        raise ValueError(f"{_ALIGNMENT_KEY} is not a power of two")
    return stated
