"""Documents to shards of tokens: in parallel, and from where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.data.documents import records, source_files
from supra_core.data.record import BadRecord, Reading, Record, Render
from supra_core.data.store import (
    INDEX,
    Ids,
    Shard,
    ShardWriter,
    TokenStore,
    tokenizer_hash,
    type_for,
    write_index,
)
from supra_core.errors import FormatError, SupraError
from supra_core.formats.atomic import atomic_file, check_replaceable, locked, put_folder, writing
from supra_core.formats.jsonfile import INDEX_BYTES, read_object
from supra_core.progress import Progress, silent
from supra_core.text import TOKENIZER, ModelTokenizer, load_tokenizer

# Pieces tokenised together, on all cores, and their characters at most.
_BATCH, _BATCH_CHARACTERS = 1024, 4_000_000
_POSITION = "position.json"
# Files that an index names; of more it states no single one.
_LISTED = 10_000
# Bad records named in the log; all are counted.
_NAMED = 10


# [name, bytes] of each file, or of very many {"count", "bytes", "sha256"}.
Listing = list[list[Any]] | dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is prepared and how; the same settings go on where they were interrupted.

    ``sources``: files, folders, and data sets of the hub; ``separator``: the token after every
    document, None for none; ``skip_bad``: leave out records that are no documents;
    ``parse_markers``: markers of turns inside messages are markers, not text; ``needs_bos``:
    documents begin as the tokenizer begins a text.
    """

    sources: tuple[str, ...]
    separator: int | None
    vocab_size: int
    field: str | None = None
    split: str = "train"
    skip_bad: bool = False
    parse_markers: bool = False
    needs_bos: bool = False
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        if not self.sources:
            raise SupraError("there is no text to prepare: name a file or a folder")
        if self.shard_tokens < 1:
            raise SupraError("a shard needs at least one token")


@dataclass
class _Position:
    """What is complete: shards, and the records in them and before."""

    shards: list[Shard] = field(default_factory=list)
    records: int = 0
    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0

    @classmethod
    def stated(cls, value: Mapping[str, Any]) -> _Position:
        """As :func:`_complete` wrote it; ValueError or KeyError names a field that is wrong."""
        shards = [Shard.stated(shard) for shard in value["shards"]]
        for name in ("records", "skipped_count"):
            if type(value[name]) is not int or not 0 <= value[name] < 2**63:
                raise ValueError(name)
        skipped = value["skipped"]
        if not isinstance(skipped, list) or not all(isinstance(text, str) for text in skipped):
            raise ValueError("skipped")
        return cls(shards, value["records"], skipped, value["skipped_count"])


def prepare(
    settings: Settings,
    assets: Mapping[str, bytes],
    out: Path,
    *,
    where: str = "the model",
    force: bool = False,
    progress: Progress = silent,
) -> TokenStore:
    """Tokenise every document into ``out``; what an interrupted call completed is kept.

    ``assets`` hold the tokenizer of ``where``, and its chat template for messages. Raises
    SupraError for a source that cannot be read, no text at all, or a record that is no document
    unless those are skipped.
    """
    check_replaceable(out, force, holds=INDEX)
    tokenizer = load_tokenizer(
        assets, where, settings.vocab_size,
        needs_bos=settings.needs_bos, parse_markers=settings.parse_markers,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "dtype": type_for(settings.vocab_size),
        "tokenizer": tokenizer_hash(assets[TOKENIZER]),
        **asdict(settings),
        "begins": list(tokenizer.begins),
        "files": listing(settings.sources),
    }
    # A path such as "." or "..", or one that is a link, has no name of its own.
    place = Path(os.path.realpath(out))
    work = place.with_name(f".{place.name}.preparing")
    with writing(place):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work) as held:
        if held is False:
            raise SupraError(
                f"{out} is being prepared by another process: wait for its end, or name another "
                "folder"
            )
        # It may have been completed while this one waited to begin.
        check_replaceable(out, force, holds=INDEX)
        position = _begun(work, facts)
        reading = Reading(settings.field, settings.split, _renderer(tokenizer), settings.vocab_size)
        _write_shards(settings, tokenizer, reading, work, position, facts, progress)
        if not position.shards:
            shutil.rmtree(work)
            raise SupraError(
                f"{', '.join(settings.sources)} has no text: name a file with some in it"
            )
        facts |= {
            "skipped": position.skipped_count,
            "skipped_first": position.skipped,
            "left_out": dict(reading.left_out),
        }
        write_index(work, position.shards, facts)
        (work / _POSITION).unlink(missing_ok=True)
        with writing(place):
            put_folder(work, place, force)
    return TokenStore(out)


def listing(sources: Sequence[str]) -> Listing:
    """The files that the sources are made of, by name and size."""
    files = [
        [file.name, file.stat().st_size] for source in sources for file in source_files(source)
    ]
    return in_short(files)


def in_short(files: Listing) -> Listing:
    """A listing as it is stated: name and size of each file, or of very many their sum alone."""
    if not isinstance(files, list) or len(files) <= _LISTED:
        return files
    return {
        "count": len(files),
        "bytes": sum(size for _, size in files),
        "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
    }


def _bytes_of(files: Listing) -> int:
    return int(files["bytes"]) if isinstance(files, dict) else sum(size for _, size in files)


def _begun(work: Path, facts: dict[str, Any]) -> _Position:
    """Where an interrupted call with the same facts stands; anything else is begun anew."""
    file = work / _POSITION
    if os.path.isfile(file):
        before = read_object(file, INDEX_BYTES)
        try:
            known = before["facts"]
            # Older versions stated every file, however many.
            known["files"] = in_short(known["files"])
            # As JSON has it: tuples are lists there.
            if known == json.loads(json.dumps(facts)):
                return _Position.stated(before)
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{file}: {error} is missing or wrong: remove {work}, to prepare the text from its "
                "beginning"
            ) from None
    with writing(work):
        # The folder itself stays: it is locked.
        for left in work.iterdir():
            left.unlink()
    return _Position()


def _write_shards(
    settings: Settings,
    tokenizer: ModelTokenizer,
    reading: Reading,
    work: Path,
    position: _Position,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    begin = np.array(tokenizer.begins, dtype=np.int64)
    end = np.array([] if settings.separator is None else [settings.separator], dtype=np.int64)
    total = _bytes_of(facts["files"])
    found = (record for source in settings.sources for record in records(source, reading))
    shard = ShardWriter(work, len(position.shards), facts["dtype"])
    taken = position.records
    try:
        for batch in _encoded(islice(found, taken, None), tokenizer):
            for entry in batch:
                if isinstance(entry, BadRecord):
                    _leave_out(entry, settings, position)
                    taken += 1
                    continue
                if entry.begins and shard.tokens >= settings.shard_tokens:
                    _complete(shard, work, position, taken, facts)
                    shard = ShardWriter(work, len(position.shards), facts["dtype"])
                if entry.begins and len(entry.ids):
                    shard.begin_document()
                    if not entry.is_closed:
                        shard.add(begin)
                shard.add(entry.ids)
                if entry.ends and len(entry.ids) and not entry.is_closed:
                    shard.add(end)
                taken += entry.ends
            if total:
                progress("tokenise", reading.bytes_read, total)
        if shard.tokens:
            _complete(shard, work, position, taken, facts)
    finally:
        shard.abandon()


def _leave_out(error: BadRecord, settings: Settings, position: _Position) -> None:
    if not settings.skip_bad:
        raise SupraError(f"{error}, or skip such records with `skip_bad`")
    position.skipped_count += 1
    if len(position.skipped) < _NAMED:
        position.skipped.append(str(error))


def _complete(
    shard: ShardWriter, work: Path, position: _Position, taken: int, facts: dict[str, Any]
) -> None:
    position.shards.append(shard.finish())
    position.records = taken
    with atomic_file(work / _POSITION) as beside:
        content = {"facts": facts, **asdict(position)}
        beside.write_text(json.dumps(content), encoding="utf-8")


# --- tokenising -------------------------------------------------------------------------------

_NONE: Ids = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class _Piece:
    """A part of the document at ``where``: the whole when it ``begins`` and ``ends`` it."""

    ids: Ids
    begins: bool
    ends: bool
    is_closed: bool
    where: str


# A piece, and its text as long as it has no ids.
_Unencoded = tuple[_Piece, str | None]


def _encoded(
    found: Iterator[Record], tokenizer: ModelTokenizer
) -> Iterator[list[_Piece | BadRecord]]:
    """Every piece with its ids, in order; the library encodes a batch on all cores."""
    for batch in _batches(_pieces(found)):
        texts = [e[1] for e in batch if not isinstance(e, BadRecord) and e[1] is not None]
        encoded = iter(tokenizer.encode_batch(texts))
        yield [_known(_with_ids(entry, encoded), tokenizer) for entry in batch]


def _with_ids(entry: _Unencoded | BadRecord, encoded: Iterator[Ids]) -> _Piece | BadRecord:
    if isinstance(entry, BadRecord):
        return entry
    piece, text = entry
    return piece if text is None else replace(piece, ids=next(encoded))


def _known(piece: _Piece | BadRecord, tokenizer: ModelTokenizer) -> _Piece | BadRecord:
    """The piece, or a BadRecord when the model has no embedding for one of its tokens."""
    problem = None if isinstance(piece, BadRecord) else tokenizer.problem(piece.ids)
    if isinstance(piece, BadRecord) or problem is None:
        return piece
    error = BadRecord(f"{piece.where}: {problem}")
    if not (piece.begins and piece.ends):
        # Other parts of so long a document may be written already.
        raise error
    return error


def _pieces(found: Iterator[Record]) -> Iterator[_Unencoded | BadRecord]:
    for record in found:
        if isinstance(record, BadRecord):
            yield record
        elif record.ids is not None:
            yield _Piece(record.ids, True, True, record.is_closed, record.where), None
        else:
            begins, waiting = True, ""
            for text in record.pieces:
                if waiting:
                    yield _Piece(_NONE, begins, False, record.is_closed, record.where), waiting
                    begins = False
                waiting = text
            yield _Piece(_NONE, begins, True, record.is_closed, record.where), waiting


def _batches(
    entries: Iterator[_Unencoded | BadRecord],
) -> Iterator[list[_Unencoded | BadRecord]]:
    batch: list[_Unencoded | BadRecord] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        if not isinstance(entry, BadRecord):
            piece, text = entry
            size += len(piece.ids if text is None else text)
        if len(batch) >= _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _renderer(tokenizer: ModelTokenizer) -> Render | None:
    """What turns messages into ids by the chat template; None when there is none."""
    if tokenizer.template is None:
        return None
    return lambda messages: np.array(tokenizer.render(messages), dtype=np.int64)
