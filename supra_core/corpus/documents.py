"""Documents from files: texts, JSON lines, Parquet, tar archives, and data sets of the hub.

Nothing is held whole but one record: a text file is read in pieces. A record that is no document
comes as a :class:`BadRecord`, so that who reads may stop or go on.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from supra_core import samples
from supra_core.errors import MissingDependencyError, SupraError

# A data set of the hub: hub:ORG/NAME.
HUB = "hub:"
# Characters of a text that are tokenised together.
_PIECE = 200_000
# No token of the usual tokenizers goes on from a letter or digit to a line's end.
_BORDER = re.compile(r"(?<=\w)\n")
_COMPRESSED = (".gz", ".zst")
_TEXT, _LINES, _PARQUET, _TAR = ".txt", (".jsonl", ".ndjson"), ".parquet", ".tar"
_KNOWN = (_TEXT, *_LINES, _PARQUET, _TAR)
# Where a record has its document, unless a field is named.
_FIELDS = ("text", "messages", "tokens", "input_ids")

Render = Callable[[list[Mapping[str, Any]]], npt.NDArray[np.int64]]


class BadRecord(SupraError):
    """One record that is no document; the next may be."""


@dataclass(frozen=True)
class Document:
    """A text in pieces, read as they are asked for, or token ids.

    ``is_closed``: it brings its own end, as conversations and token ids do.
    """

    pieces: Iterable[str] = ()
    ids: npt.NDArray[np.int64] | None = None
    is_closed: bool = False


Record = Document | BadRecord


@dataclass
class Reading:
    """How to read: a record's ``field`` (None: text, messages, tokens or input_ids, whichever
    it has), the hub's ``split``, ``render``, which turns a conversation's messages into token
    ids, and the size of the vocabulary that token ids are of.

    ``bytes_read`` is where in the files the reader stands.
    """

    field: str | None = None
    split: str = "train"
    render: Render | None = None
    vocab_size: int = 2**32
    bytes_read: int = 0


def source_files(source: str) -> list[Path]:
    """The files of a source: itself, or the known ones of a folder in order of name.

    A folder of synthesized text is its samples. A data set of the hub has no files here.
    SupraError when there is nothing to read.
    """
    if source.startswith(HUB):
        return []
    path = Path(source)
    if samples.is_synthesis(path):
        return [samples.finished(path)]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if _is_known(file) and file.is_file()]
        if not files:
            raise SupraError(f"{path} holds no file that ends in {', '.join(_KNOWN)}: name others")
        return files
    if not path.is_file():
        raise SupraError(f"{path} does not exist: name a text file or a folder of them")
    return [path]


def records(source: str, reading: Reading) -> Iterator[Record]:
    """Every document of a source in order, and what is none in its place."""
    if source.startswith(HUB):
        yield from _hub(source.removeprefix(HUB), reading)
        return
    before = reading.bytes_read
    for file in source_files(source):
        with _reading(file):
            yield from _file(file, reading, before)
        before += file.stat().st_size
        reading.bytes_read = before


def _is_known(file: Path) -> bool:
    return not file.name.startswith(".") and _kind(file) in _KNOWN


def _kind(file: Path) -> str:
    """The ending that says what is inside, without that of a compression."""
    name = file.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix.replace(".tgz", _TAR)


def _file(file: Path, reading: Reading, before: int) -> Iterator[Record]:
    kind = _kind(file)
    if kind == _PARQUET:
        yield from _parquet(file, reading, before)
        return
    with open(file, "rb") as raw, _uncompressed(file, raw) as stream:
        followed = _follow(stream, raw, reading, before)
        if file.name == samples.SAMPLES and samples.is_synthesis(file.parent):
            yield from _samples(_parsed_lines(file, stream, followed))
        elif kind in _LINES:
            yield from _json_lines(file, stream, followed, reading)
        elif kind == _TAR:
            yield from _archive(file, stream, followed, reading)
        else:
            yield Document(_text_pieces(file, stream, followed))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """What goes wrong with a file as a whole, in a sentence that names it."""
    try:
        yield
    except UnicodeDecodeError:
        raise SupraError(f"{file} is not UTF-8 text: convert it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise SupraError(f"{file} is damaged ({error}): get it again") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise SupraError(f"{file} cannot be read ({reason}): check the file") from None


@contextmanager
def _uncompressed(file: Path, raw: IO[bytes]) -> Iterator[IO[bytes]]:
    ending = file.suffix.lower()
    if ending == ".zst":
        arrow = _library("pyarrow", file)
        # Unlike others it notices when the end of a file is missing.
        with arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd") as stream:
            yield io.BufferedReader(stream)
    elif ending in (".gz", ".tgz"):
        with gzip.open(raw) as stream:
            yield stream  # type: ignore[misc]
    else:
        yield raw


def _follow(stream: IO[bytes], raw: IO[bytes], reading: Reading, before: int) -> Callable[[], None]:
    """What notes how far the file has been read."""

    def followed() -> None:
        reading.bytes_read = before + raw.tell()

    return followed


# --- texts ------------------------------------------------------------------------------------


def _text_pieces(file: Path, stream: IO[bytes], followed: Callable[[], None]) -> Iterator[str]:
    """The file's text, cut where no token spans the border."""
    with _reading(file):
        text = io.TextIOWrapper(stream, encoding="utf-8")
        left = ""
        while more := text.read(_PIECE):
            left += more
            followed()
            while len(left) > _PIECE and (end := _border(left)):
                yield left[:end]
                left = left[end:]
        text.detach()
    if left:
        yield left


def _border(text: str) -> int:
    """Where the piece that begins ``text`` ends; 0: not yet."""
    found = _BORDER.search(text, _PIECE)
    if found:
        return found.start()
    # A text without such lines is cut anyhow.
    return _PIECE if len(text) > 4 * _PIECE else 0


def pieces(text: str) -> Iterator[str]:
    """A whole text in pieces whose tokens are the text's."""
    while len(text) > 4 * _PIECE:
        end = _border(text)
        yield text[:end]
        text = text[end:]
    yield text


# --- records ----------------------------------------------------------------------------------


def _json_lines(
    file: Path, stream: IO[bytes], followed: Callable[[], None], reading: Reading
) -> Iterator[Record]:
    for where, record in _parsed_lines(file, stream, followed):
        try:
            yield record if isinstance(record, BadRecord) else _document(record, where, reading)
        except BadRecord as error:
            yield error


def _parsed_lines(
    file: Path, stream: IO[bytes], followed: Callable[[], None]
) -> Iterator[tuple[str, Any]]:
    """Where each line stands, and what it holds; a BadRecord for what is no JSON."""
    for number, line in enumerate(stream, 1):
        followed()
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            yield where, _parsed(line)
        except ValueError as error:
            yield where, BadRecord(f"{where} is no JSON ({error}): correct it")


def _samples(lines: Iterator[tuple[str, Any]]) -> Iterator[Record]:
    """Synthesized samples but those that were dropped; each brings its end, if it has one."""
    for where, line in lines:
        if isinstance(line, BadRecord):
            yield line
        elif not isinstance(line, dict) or not isinstance(line.get("text"), str):
            yield BadRecord(f"{where} is no sample: synthesize again with --force")
        elif not line.get("dropped"):
            yield Document(pieces(line["text"]), is_closed=True)


def _archive(
    file: Path, stream: IO[bytes], followed: Callable[[], None], reading: Reading
) -> Iterator[Record]:
    """Members .txt are texts; .json lists of token ids, as OpenLM's shards, or records."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            followed()
            kind = _kind(Path(member.name))
            content = archive.extractfile(member) if kind in (_TEXT, ".json") else None
            if content is None:
                continue
            where = f"{file}: {member.name}"
            try:
                with content:
                    yield _member(kind, member.name, content.read(), where, reading)
            except BadRecord as error:
                yield error
            except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
                yield BadRecord(f"{where} cannot be read ({error}): correct it")


def _member(kind: str, name: str, content: bytes, where: str, reading: Reading) -> Document:
    if name.lower().endswith(".gz"):
        content = gzip.decompress(content)
    if kind == _TEXT:
        return Document(pieces(content.decode("utf-8")))
    return _document(_parsed(content), where, reading)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parquet(file: Path, reading: Reading, before: int) -> Iterator[Record]:
    library = _library("pyarrow", file)
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        table = parquet.ParquetFile(file)
        names = list(table.schema_arrow.names)
        wanted = [reading.field] if reading.field else [n for n in _FIELDS if n in names][:1]
        if not wanted or wanted[0] not in names:
            raise SupraError(
                f"{file} has no column {reading.field or ' or '.join(_FIELDS)}, but "
                f"{', '.join(names)}: name one with --field"
            )
        row, size = 0, file.stat().st_size
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                try:
                    yield _document(record, f"{file} row {row}", reading)
                except BadRecord as error:
                    yield error
            reading.bytes_read = before + size * row // max(1, table.metadata.num_rows)
    except library.ArrowException as error:
        raise SupraError(f"{file} is no Parquet file ({error}): get it again") from None


def _hub(name: str, reading: Reading) -> Iterator[Record]:
    _library("datasets", name)
    datasets = importlib.import_module("datasets")
    name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=reading.split, streaming=True)
        rows = enumerate(found, 1)
        while (entry := next(rows, None)) is not None:
            try:
                yield _document(entry[1], f"{name} row {entry[0]}", reading)
            except BadRecord as error:
                yield error
    # Whatever a loader meets: no network, no such set or split, a file that is damaged.
    except Exception as error:
        if isinstance(error, SupraError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SupraError(
            f"the data set {name} cannot be read ({reason}): check its name, --split and the "
            "network"
        ) from None


def _document(record: Any, where: str, reading: Reading) -> Document:
    """The document of one record; :class:`BadRecord` when it has none."""
    if isinstance(record, list):
        return _from_ids(record, where, reading)
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is no object: correct it")
    field = reading.field or next((name for name in _FIELDS if name in record), None)
    if field is None or field not in record:
        fields = ", ".join(record) or "no field at all"
        raise BadRecord(
            f"{where} has no field {field or ' or '.join(_FIELDS)}, but {fields}: name one with "
            "--field"
        )
    value = record[field]
    if isinstance(value, str):
        return Document(pieces(value))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        ids = _conversation(value, f"{where}: {field}", reading)
        return Document(ids=ids, is_closed=True)
    if isinstance(value, list):
        return _from_ids(value, f"{where}: {field}", reading)
    raise BadRecord(f"{where}: {field} is neither text nor messages nor token ids: correct it")


def _conversation(messages: list[Any], where: str, reading: Reading) -> npt.NDArray[np.int64]:
    for message in messages:
        parts = message if isinstance(message, dict) else {}
        if not all(isinstance(parts.get(key), str) for key in ("role", "content")):
            raise BadRecord(f"{where} has a message without a text role and content: correct it")
    if reading.render is None:
        raise SupraError(f"{where} are messages, and the tokenizer has no chat template for them")
    try:
        return reading.render(messages)
    except SupraError as error:
        raise BadRecord(f"{where}: {error}") from None


def _from_ids(values: list[Any], where: str, reading: Reading) -> Document:
    size = reading.vocab_size
    if not all(type(value) is int and 0 <= value < size for value in values):
        raise BadRecord(f"{where} is no list of token ids from 0 to {size - 1}: correct it")
    return Document(ids=np.array(values, dtype=np.int64), is_closed=True)


def _library(name: str, needed_by: str | Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDependencyError.of(name, str(needed_by), "data") from None
