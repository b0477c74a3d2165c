"""A folder of token ids in shards, read by mapping them into memory.

``index.json`` says what the shards hold; ``tokens-00000.bin`` are the ids of one document after
the other, as little-endian unsigned integers of 2 or 4 bytes, and ``documents-00000.bin`` where
each document begins in it, as 8-byte ones. A document is never divided between shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError
from supra_core.formats.atomic import atomic_file, flush_to_disk, writing
from supra_core.formats.checksums import digest_of
from supra_core.formats.jsonfile import INDEX_BYTES, read_object

INDEX = "index.json"
FORMAT, VERSION = "supra-tokens", 1

_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STARTS: np.dtype[Any] = np.dtype("<u8")

Ids = npt.NDArray[Any]


@dataclass(frozen=True)
class Shard:
    """One shard's size, and the SHA-256 of both its files; older folders have the tokens' alone."""

    tokens: int
    documents: int
    sha256: str
    documents_sha256: str | None = None

    @classmethod
    def stated(cls, value: object) -> Shard:
        """As an index states it; ValueError for what describes no shard."""
        if not isinstance(value, dict) or not value.keys() <= cls.__dataclass_fields__.keys():
            raise ValueError("shards")
        for name, field in value.items():
            if name in ("tokens", "documents"):
                right = type(field) is int and 0 <= field < 2**63
            else:
                right = isinstance(field, str) or (field is None and name == "documents_sha256")
            if not right:
                raise ValueError(name)
        return cls(**value)


def type_for(vocab_size: int) -> str:
    """The smaller type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_hash(tokenizer_json: bytes) -> str:
    """SHA-256 of what a tokenizer.json says, however it is laid out."""
    content = json.loads(tokenizer_json)
    for setting in ("truncation", "padding"):
        # Whoever encodes with it sets these.
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
        """What is added from here on is another document's."""
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
            # Not by tofile, which does not see a disk that is full.
            starts = np.array(self._starts, dtype=_STARTS).tobytes()
            self._documents.write_bytes(starts)
            flush_to_disk(self._documents)
        return Shard(
            self.tokens, len(self._starts), self._digest.hexdigest(),
            hashlib.sha256(starts).hexdigest(),
        )  # fmt: skip

    def abandon(self) -> None:
        """Close the shard without completing it."""
        # What could not be written raised when it was.
        with suppress(OSError):
            self._file.close()


class TokenStore:
    """The tokens of a prepared folder as one long sequence, mapped, not read."""

    def __init__(self, folder: Path) -> None:
        """:class:`FormatError` when ``folder`` holds no complete store."""
        self.folder = folder
        self.index = read_object(folder / INDEX, INDEX_BYTES)
        if self.index.get("format") != FORMAT:
            raise FormatError(f"{folder / INDEX} is of no prepared text: name another folder")
        version = self.index.get("version")
        if type(version) is not int or version != VERSION:
            raise FormatError(
                f"{folder / INDEX}: version {version} is not known: prepare the text again"
            )
        try:
            self._dtype = _TYPES[self.index["dtype"]]
            self.shards = tuple(map(Shard.stated, self.index["shards"]))
            self.tokenizer_hash = str(self.index["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{folder / INDEX}: {error} is missing or wrong: prepare the text again"
            ) from None
        self._check_sizes()
        self._ends = np.cumsum([shard.tokens for shard in self.shards])

    @staticmethod
    def is_at(folder: Path) -> bool:
        """Whether there is a prepared text."""
        return os.path.isfile(folder / INDEX)

    @property
    def name(self) -> str:
        """SHA-256 of every shard, in order: another text has another."""
        digests = "".join(shard.sha256 for shard in self.shards)
        return hashlib.sha256(digests.encode()).hexdigest()

    def check(self, remedy: str = "prepare the text again") -> None:
        """Read every shard once and compare it with its sums.

        Raises FormatError that names the file which is not as it was written, and ``remedy``.
        """
        for number, shard in enumerate(self.shards):
            sums = (shard.sha256, shard.documents_sha256)
            for file, stated in zip(_names(self.folder, number), sums, strict=True):
                if stated is not None and digest_of(file) != stated:
                    raise FormatError(f"{file} is not as it was written: {remedy}")
            # Where documents begin had no sum in older versions.
            starts = self._starts[number]
            ordered = bool(np.all(starts[1:] > starts[:-1]))
            if len(starts) and not (ordered and starts[-1] < shard.tokens):
                raise FormatError(
                    f"{_names(self.folder, number)[1]} does not say where documents begin: {remedy}"
                )

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

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
        number = int(np.searchsorted(self._ends, start, side="right"))
        while number < len(self.shards) and self._before(number) < stop:
            before, own = self._before(number), self._starts[number]
            first, last = np.searchsorted(own, [max(start - before, 0), stop - before])
            found.append(own[first:last].astype(np.int64) + before)
            number += 1
        return np.concatenate(found)

    def most_documents(self, length: int) -> int:
        """The most documents that begin or go on in any of the rows of ``length`` tokens."""
        most, row, begun = 1, -1, 0
        for number, own in enumerate(self._starts):
            # What begins a row is no further document in it.
            places = own.astype(np.int64) + self._before(number)
            rows, counts = np.unique(places[places % length > 0] // length, return_counts=True)
            if not len(rows):
                continue
            if rows[0] == row:
                counts[0] += begun
            most = max(most, 1 + int(counts.max()))
            row, begun = int(rows[-1]), int(counts[-1])
        return most

    def _before(self, number: int) -> int:
        """Tokens in the shards before one."""
        return int(self._ends[number - 1]) if number else 0

    @cached_property
    def _maps(self) -> list[Ids]:
        return [
            _mapped(_names(self.folder, number)[0], self._dtype, shard.tokens)
            for number, shard in enumerate(self.shards)
        ]

    @cached_property
    def _starts(self) -> list[Ids]:
        return [
            _mapped(_names(self.folder, number)[1], _STARTS, shard.documents)
            for number, shard in enumerate(self.shards)
        ]

    def _between(self, start: int, stop: int) -> Ids:
        parts = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            before = self._before(number)
            end = min(stop, int(self._ends[number]))
            parts.append(self._maps[number][start - before : end - before])
            start, number = end, number + 1
        if len(parts) == 1:
            return np.asarray(parts[0])
        return np.concatenate(parts) if parts else np.empty(0, dtype=self._dtype)

    def _check_sizes(self) -> None:
        for number, shard in enumerate(self.shards):
            sizes = (shard.tokens * self._dtype.itemsize, shard.documents * _STARTS.itemsize)
            for file, size in zip(_names(self.folder, number), sizes, strict=True):
                found = file.stat().st_size if file.is_file() else None
                if found != size:
                    said = "is missing" if found is None else f"has {found:,} bytes, not {size:,}"
                    raise FormatError(f"{file} {said}: prepare the text again")


def _mapped(file: Path, dtype: np.dtype[Any], count: int) -> Ids:
    # An empty file cannot be mapped.
    return np.memmap(file, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)


def write_index(folder: Path, shards: list[Shard], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a folder of shards; returns what the index says."""
    index = {
        "format": FORMAT,
        "version": VERSION,
        **facts,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "shards": [asdict(shard) for shard in shards],
    }
    with atomic_file(folder / INDEX) as beside:
        beside.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


def _names(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"tokens-{number:05}.bin", folder / f"documents-{number:05}.bin"
