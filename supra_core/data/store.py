"""A folder of token ids in shards, read by mapping them into memory.

``index.json`` describes the shards; ``tokens-00000.bin`` holds the ids of one document after the
other, as little-endian unsigned integers of 2 or 4 bytes, and ``documents-00000.bin`` where each
document begins in it, as 8-byte ones. A document is never divided between shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from supra_core.errors import FormatError
from supra_core.formats.atomic import atomic_file, flush_to_disk, writing
from supra_core.formats.checksums import digest_of
from supra_core.formats.jsonfile import INDEX_BYTES, read_object, write_object

INDEX = "index.json"
FORMAT, VERSION = "supra-tokens", 1

_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STARTS: np.dtype[Any] = np.dtype("<u8")

Ids = npt.NDArray[Any]
T = TypeVar("T")
# A size or a count as a file states it.
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Shard:
    """One shard's size, and the SHA-256 of both its files; older folders have the tokens' alone."""

    tokens: Count
    documents: Count
    sha256: str
    documents_sha256: str | None = None


@dataclass(frozen=True)
class _Index:
    """The fields of ``index.json`` that are read; it states more."""

    dtype: str
    shards: tuple[Shard, ...]
    tokenizer: str


def type_for(vocab_size: int) -> str:
    """The smaller type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_hash(tokenizer_json: bytes) -> str:
    """SHA-256 of the content of a tokenizer.json, without layout and settings of the caller."""
    content = json.loads(tokenizer_json)
    for setting in ("truncation", "padding"):
        content.pop(setting, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ShardWriter:
    """Appends tokens to one shard of a folder."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self._dtype = _TYPES[dtype]
        self._tokens, self._documents = _names(folder, number)
        with writing(folder):
            self._file = open(self._tokens, "wb")  # noqa: SIM115 - closed with the shard
        self._starts = array("Q")
        self._digest = hashlib.sha256()
        self.tokens = 0

    def begin_document(self) -> None:
        """The tokens added from here on are another document's."""
        self._starts.append(self.tokens)

    def add(self, ids: Ids) -> None:
        """More tokens of the document."""
        data = np.ascontiguousarray(ids, dtype=self._dtype).tobytes()
        with writing(self._tokens):
            self._file.write(data)
        self._digest.update(data)
        self.tokens += len(ids)

    def finish(self) -> Shard:
        """Close the shard; it is complete, and on disk."""
        with writing(self._tokens):
            self._file.close()
            flush_to_disk(self._tokens)
            # Not by tofile, which does not notice a full disk.
            starts = np.array(self._starts, dtype=_STARTS).tobytes()
            self._documents.write_bytes(starts)
            flush_to_disk(self._documents)
        return Shard(
            self.tokens, len(self._starts), self._digest.hexdigest(),
            hashlib.sha256(starts).hexdigest(),
        )  # fmt: skip

    def abandon(self) -> None:
        """Close the shard without completing it."""
        # A failed write has raised already.
        with suppress(OSError):
            self._file.close()


class TokenStore:
    """The tokens of a prepared folder as one long sequence, mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """:class:`FormatError` when ``folder`` holds no complete store."""
        self.folder = folder
        self.index = read_object(folder / INDEX, INDEX_BYTES)
        if self.index.get("format") != FORMAT:
            raise FormatError(f"{folder / INDEX} is not a prepared text's: name another folder")
        version = self.index.get("version")
        if type(version) is not int or version != VERSION:
            raise FormatError(
                f"{folder / INDEX}: version {version} is not known: prepare the text again"
            )
        index = checked(_Index, self.index, folder / INDEX, "prepare the text again")
        if index.dtype not in _TYPES:
            raise FormatError(
                f"{folder / INDEX}: dtype {index.dtype} is not known: prepare the text again"
            )
        self._dtype, self.shards = _TYPES[index.dtype], index.shards
        self.tokenizer_hash = index.tokenizer
        self._files = [_names(folder, number) for number in range(len(self.shards))]
        self._check_sizes()
        # Tokens before each shard, and in all.
        self._ends = np.cumsum([0, *(shard.tokens for shard in self.shards)])

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether ``folder`` holds a prepared text."""
        return os.path.isfile(folder / INDEX)

    @property
    def name(self) -> str:
        """SHA-256 of all shards in order, which identifies the text."""
        digests = "".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()

    def check(self, remedy: str = "prepare the text again") -> None:
        """Read every shard once and compare it with its sums.

        FormatError names the file that has changed, and ``remedy``.
        """
        for files, shard, starts in zip(self._files, self.shards, self._starts, strict=True):
            for file, stated in zip(files, (shard.sha256, shard.documents_sha256), strict=True):
                if stated is not None and digest_of(file) != stated:
                    raise FormatError(f"{file} is not as it was written: {remedy}")
            # Older versions stored no sum of the file of documents.
            ordered = bool(np.all(starts[1:] > starts[:-1]))
            if len(starts) and not (ordered and starts[-1] < shard.tokens):
                raise FormatError(f"{files[1]} does not say where documents begin: {remedy}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Ids: ...
    def __getitem__(self, place: int | slice) -> int | Ids:
        """One id, or those of a contiguous slice as an array."""
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                raise ValueError("a store is read in contiguous slices")
            return self._between(start, stop)
        index = range(len(self))[place]
        return int(self._between(index, index + 1)[0])

    def documents(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Where documents begin among the tokens from ``start`` to ``stop``, in the whole."""
        found = [np.empty(0, dtype=np.int64)]
        for number, before in self._shards_between(start, stop):
            own = self._starts[number]
            first, last = np.searchsorted(own, [max(start - before, 0), stop - before])
            found.append(own[first:last].astype(np.int64) + before)
        return np.concatenate(found)

    def most_documents(self, length: int) -> int:
        """The most documents that begin or continue in any of the rows of ``length`` tokens."""
        most, row, begun = 1, -1, 0
        for own, before in zip(self._starts, self._ends, strict=False):
            # A document that begins with the row is not a further one in it.
            places = own.astype(np.int64) + before
            rows, counts = np.unique(places[places % length > 0] // length, return_counts=True)
            if not len(rows):
                continue
            if rows[0] == row:
                counts[0] += begun
            most = max(most, 1 + int(counts.max()))
            row, begun = int(rows[-1]), int(counts[-1])
        return most

    def _shards_between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Each shard with tokens from ``start`` to ``stop``: its number, and the tokens before."""
        number = int(np.searchsorted(self._ends, start, side="right")) - 1
        while number < len(self.shards) and self._ends[number] < stop:
            yield number, int(self._ends[number])
            number += 1

    @cached_property
    def _maps(self) -> list[Ids]:
        return [_mapped(tokens, self._dtype) for tokens, _ in self._files]

    @cached_property
    def _starts(self) -> list[Ids]:
        return [_mapped(documents, _STARTS) for _, documents in self._files]

    def _between(self, start: int, stop: int) -> Ids:
        parts = [
            self._maps[number][max(start - before, 0) : stop - before]
            for number, before in self._shards_between(start, stop)
        ]
        if len(parts) == 1:
            return np.asarray(parts[0])
        return np.concatenate(parts) if parts else np.empty(0, dtype=self._dtype)

    def _check_sizes(self) -> None:
        for files, shard in zip(self._files, self.shards, strict=True):
            sizes = (shard.tokens * self._dtype.itemsize, shard.documents * _STARTS.itemsize)
            for file, size in zip(files, sizes, strict=True):
                found = file.stat().st_size if file.is_file() else None
                if found != size:
                    said = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
                    raise FormatError(f"{file} {said}: prepare the text again")


def checked(kind: type[T], value: object, file: Path, remedy: str) -> T:
    """The fields of ``kind`` as ``file`` states them; FormatError names one that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise FormatError(f"{file}: {name} is missing or wrong: {remedy}") from None


def _mapped(file: Path, dtype: np.dtype[Any]) -> Ids:
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)


def write_index(folder: Path, shards: list[Shard], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a folder of shards; returns the content of the index."""
    index = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    with atomic_file(folder / INDEX) as beside:
        write_object(beside, index)
    return index


def _names(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"tokens-{number:05}.bin", folder / f"documents-{number:05}.bin"
