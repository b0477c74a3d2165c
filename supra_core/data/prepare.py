"""Documents to shards of tokens: in parallel, and resumed after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.data.documents import records, source_files
from supra_core.data.record import BadRecord, Document, Reading, Record, Render
from supra_core.data.store import (
    INDEX,
    Count,
    Ids,
    Shard,
    ShardWriter,
    TokenStore,
    checked,
    tokenizer_hash,
    type_for,
    write_index,
)
from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file, check_replaceable, locked, put_folder, writing
from supra_core.formats.jsonfile import INDEX_BYTES, read_object
from supra_core.progress import Progress, silent
from supra_core.text import TOKENIZER, ModelTokenizer, load_tokenizer

# Pieces tokenised together, on all cores, and their characters at most.
_BATCH, _BATCH_CHARACTERS = 1024, 4_000_000
_POSITION = "position.json"
# Files that an index names; more are stated as one sum.
_LISTED = 10_000
# Bad records named in the log; all are counted.
_NAMED = 10

# [name, bytes] of each file, or {"count", "bytes", "sha256"} of more than _LISTED.
Listing = list[list[Any]] | dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is prepared and how; the same settings resume an interrupted preparation.

    ``sources``: files, folders, and data sets of the hub; ``separator``: the token after every
    document, or None; ``skip_bad``: skip records that are not documents; ``parse_markers``:
    markers of turns inside messages are markers, not text; ``needs_bos``: documents begin as the
    tokenizer begins a text.
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

    shards: list[Shard]
    records: Count
    skipped: list[str]
    skipped_count: Count


@dataclass(frozen=True)
class _Begun:
    """The fields of ``position.json`` that say what is being prepared."""

    facts: dict[str, Any]


def prepare(
    settings: Settings,
    assets: Mapping[str, bytes],
    out: Path,
    *,
    where: str = "the model",
    force: bool = False,
    progress: Progress = silent,
) -> TokenStore:
    """Tokenise every document into ``out``; shards that an interrupted call completed are kept.

    ``assets`` hold the tokenizer of ``where``, and its chat template for messages. Raises
    SupraError for a source that cannot be read, no text at all, or, unless they are skipped, a
    record that is not a document.
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
    # A path such as "." or "..", or a link, has no name of its own.
    place = Path(os.path.realpath(out))
    work = place.with_name(f".{place.name}.preparing")
    with writing(place):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work) as held:
        if held is False:
            raise SupraError(
                f"{out} is being prepared by another process: wait until it ends, or name another "
                "folder"
            )
        # Another process may have completed it meanwhile.
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
    """The files of the sources, by name and size."""
    files = [
        [file.name, file.stat().st_size] for source in sources for file in source_files(source)
    ]
    return in_short(files)


def in_short(files: Listing) -> Listing:
    """A listing as an index states it: each file, or the sum of more than _LISTED."""
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
    """The position of an interrupted call with the same facts; else the folder is emptied."""
    file = work / _POSITION
    if os.path.isfile(file):
        before = read_object(file, INDEX_BYTES)
        remedy = f"remove {work}, to prepare the text from its beginning"
        known = checked(_Begun, before, file, remedy).facts
        # Older versions stated every file, however many.
        with suppress(TypeError, ValueError):
            known["files"] = in_short(known.get("files", []))
        # In JSON, tuples are lists.
        if known == json.loads(json.dumps(facts)):
            return checked(_Position, before, file, remedy)
    with writing(work):
        # The folder itself stays: it is locked.
        for left in work.iterdir():
            left.unlink()
    return _Position([], 0, [], 0)


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
                    _skip(entry, settings, position)
                    taken += 1
                    continue
                if entry.begins and shard.tokens >= settings.shard_tokens:
                    _complete(shard, work, position, taken, facts)
                    shard = ShardWriter(work, len(position.shards), facts["dtype"])
                if entry.begins and len(entry.ids):
                    shard.begin_document()
                    if not entry.document.is_closed:
                        shard.add(begin)
                shard.add(entry.ids)
                if entry.ends and len(entry.ids) and not entry.document.is_closed:
                    shard.add(end)
                taken += entry.ends
            if total:
                progress("tokenise", reading.bytes_read, total)
        if shard.tokens:
            _complete(shard, work, position, taken, facts)
    finally:
        shard.abandon()


def _skip(error: BadRecord, settings: Settings, position: _Position) -> None:
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


@dataclass
class _Piece:
    """A part of a document, the whole if it ``begins`` and ``ends`` it; a text gets ids later."""

    document: Document
    begins: bool
    ends: bool
    text: str = ""
    ids: Ids = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def _encoded(
    found: Iterator[Record], tokenizer: ModelTokenizer
) -> Iterator[list[_Piece | BadRecord]]:
    """Every piece with its ids, in order; the library encodes a batch on all cores."""
    for batch in _batches(_pieces(found)):
        texts = [e for e in batch if isinstance(e, _Piece) and e.document.ids is None]
        encoded = tokenizer.encode_batch([piece.text for piece in texts])
        for piece, ids in zip(texts, encoded, strict=True):
            piece.ids = ids
        yield [_known(entry, tokenizer) if isinstance(entry, _Piece) else entry for entry in batch]


def _known(piece: _Piece, tokenizer: ModelTokenizer) -> _Piece | BadRecord:
    """The piece, or a BadRecord when the model has no embedding for one of its tokens."""
    problem = tokenizer.problem(piece.ids)
    if problem is None:
        return piece
    error = BadRecord(f"{piece.document.where}: {problem}")
    if not (piece.begins and piece.ends):
        # Other parts of such a long document may be written already.
        raise error
    return error


def _pieces(found: Iterator[Record]) -> Iterator[_Piece | BadRecord]:
    for record in found:
        if isinstance(record, BadRecord):
            yield record
        elif record.ids is not None:
            yield _Piece(record, True, True, ids=record.ids)
        else:
            begins, waiting = True, ""
            for text in record.pieces:
                if waiting:
                    yield _Piece(record, begins, False, waiting)
                    begins = False
                waiting = text
            yield _Piece(record, begins, True, waiting)


def _batches(entries: Iterator[_Piece | BadRecord]) -> Iterator[list[_Piece | BadRecord]]:
    batch: list[_Piece | BadRecord] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        if isinstance(entry, _Piece):
            size += len(entry.text) + len(entry.ids)
        if len(batch) >= _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _renderer(tokenizer: ModelTokenizer) -> Render | None:
    """A function from messages to ids by the chat template; None when there is no template."""
    if tokenizer.template is None:
        return None
    return lambda messages: np.array(tokenizer.render(messages), dtype=np.int64)
