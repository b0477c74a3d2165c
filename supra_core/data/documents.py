"""Documents from files: texts, JSON, tables, tar archives, and data sets of the hub.

Memory holds one record, or one member of an archive, at a time; text files are read in pieces. A
record that is not a document comes as a :class:`BadRecord`, so that the reader may stop or skip it.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from supra_core.data.json_values import values
from supra_core.data.record import (
    BadRecord,
    Document,
    Reading,
    Record,
    border,
    columns,
    document,
    pieces,
)
from supra_core.data.synthesis import folder as samples
from supra_core.errors import FormatError, MissingDependencyError, SupraError, reason
from supra_core.formats import jsonfile
from supra_core.text.plain import BOM, other_code, plain

if TYPE_CHECKING:
    # It has no parameters when it runs.
    Stream = io.BufferedReader[Any]

# A data set of the hub: hub:ORG/NAME.
HUB = "hub:"
# Characters of a text that are read together.
_CHUNK = 200_000
# Modules whose open() reads the compression; Zstandard is pyarrow's.
_OPENERS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
_ZSTANDARD = ".zst"
_TEXTS, _LINES, _JSON = (".txt", ".md", ".rst"), (".jsonl", ".ndjson"), ".json"
_TABLES = {".csv": ",", ".tsv": "\t"}
_PARQUET, _TAR, _NO_ENDING = ".parquet", ".tar", ""
_KNOWN = (*_TEXTS, *_LINES, _JSON, *_TABLES, _PARQUET, _TAR)
_NAMED_KNOWN = f"{', '.join(_KNOWN)} (also compressed: {', '.join((*_OPENERS, _ZSTANDARD))})"
# Names that macOS and pax add to archives; hidden names are skipped likewise.
_LITTER = ("__MACOSX", "PaxHeader")

Followed = Callable[[], None]


def source_files(source: str) -> list[Path]:
    """The files of a source: itself, or the known ones of a folder in order of name.

    For a folder of synthesized text the samples, for a data set of the hub none. SupraError when
    there is nothing to read.
    """
    if source.startswith(HUB):
        return []
    path = Path(source)
    if samples.is_synthesis(path):
        return [samples.finished(path)]
    if path.is_dir():
        files = [file for file in _inside(path) if _kind(file.name) in _KNOWN and file.is_file()]
        if not files:
            raise SupraError(f"{path} holds no file that ends in {_NAMED_KNOWN}: name another")
        return files
    if not path.is_file():
        raise SupraError(f"{path} does not exist: name a text file or a folder of them")
    if _kind(path.name) not in (*_KNOWN, _NO_ENDING):
        raise SupraError(
            f"{path} ends in {_kind(path.name)}, which is not read as text: convert it to one of "
            f"{_NAMED_KNOWN}"
        )
    return [path]


def refuse_records(path: Path) -> None:
    """Raise FormatError for a file of records, where one text is wanted."""
    if _kind(path.name) in _KNOWN and _kind(path.name) not in _TEXTS:
        raise FormatError(f"{path} holds records, not one text: write the text to a text file")


def records(source: str, reading: Reading) -> Iterator[Record]:
    """Every document of a source in order, or a BadRecord in its place."""
    if source.startswith(HUB):
        yield from _hub(source.removeprefix(HUB), reading)
        return
    files, folder = source_files(source), Path(source)
    if folder.is_dir() and not samples.is_synthesis(folder):
        others = set(_inside(folder)).difference(files)
        reading.left_out.update("folder" if f.is_dir() else _ending(f.name) for f in others)
    before = reading.bytes_read
    for file in files:
        with _reading(str(file)), open(file, "rb") as raw:

            def followed(raw: Stream = raw, before: int = before) -> None:
                reading.bytes_read = before + raw.tell()

            if file.name == samples.SAMPLES and samples.is_synthesis(file.parent):
                yield from _samples(_parsed(str(file), enumerate(raw, 1), followed))
            else:
                yield from _content(file.name, raw, str(file), followed, reading)
        before += file.stat().st_size
        reading.bytes_read = before


def in_words(left_out: Mapping[str, int]) -> str:
    """Files that were not read, the most frequent ending first: ``2 .jpg, 1 .xml``."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {ending}" for ending, count in ordered)


def _inside(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, in order of name."""
    return [path for path in sorted(folder.iterdir()) if not _is_litter(path.name)]


def _is_litter(name: str) -> bool:
    """Whether a file is hidden, or lies in a folder that is."""
    parts = (part for part in PurePosixPath(name).parts if part != "..")
    return any(part.startswith((".", *_LITTER)) for part in parts)


def _kind(name: str) -> str:
    """The ending that names the content, in lower case, without that of a compression."""
    inner = name.lower().replace(".tgz", _TAR + ".gz")
    for ending in (*_OPENERS, _ZSTANDARD):
        if inner.endswith(ending):
            kind = PurePosixPath(inner.removesuffix(ending)).suffix
            # Parquet is compressed inside.
            return kind + ending if kind == _PARQUET else kind
    return PurePosixPath(inner).suffix


def _ending(name: str) -> str:
    return _kind(name) or "without an ending"


# --- containers -------------------------------------------------------------------------------


def _content(
    name: str, raw: Stream, where: str, followed: Followed, reading: Reading
) -> Iterator[Record]:
    """The documents of one file, or of one member of an archive, by the ending of its name."""
    kind = _kind(name)
    if kind == _PARQUET:
        yield from _parquet(where, raw, followed, reading)
        return
    with _uncompressed(name, raw, where) as stream:
        if kind == _TAR:
            yield from _archive(where, stream, followed, reading)
            return
        if code := other_code(stream.peek(4)):
            raise BadRecord(f"{where} is {code}, not UTF-8: convert it")
        if kind in _LINES:
            yield from _documents(_parsed(where, enumerate(stream, 1), followed), reading)
        elif kind == _JSON:
            yield from _documents(_parsed(where, values(stream), followed), reading)
        elif kind in _TABLES:
            yield from _documents(_rows(where, stream, _TABLES[kind], followed, reading), reading)
        else:
            yield Document(where, _text_pieces(where, stream, followed))


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns an error of a whole file into a BadRecord that names it."""
    import lzma

    try:
        yield
    except UnicodeDecodeError:
        raise BadRecord(f"{where} is not UTF-8 text: convert it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        raise BadRecord(f"{where} is damaged ({error}): get it again") from None
    except OSError as error:
        raise BadRecord(f"{where} cannot be read ({reason(error)}): check the file") from None


@contextmanager
def _uncompressed(name: str, raw: Stream, where: str) -> Iterator[Stream]:
    ending = PurePosixPath(name.lower().replace(".tgz", ".gz")).suffix
    if ending == _ZSTANDARD:
        arrow = _library("pyarrow", where)
        # Unlike other libraries, it notices a truncated file.
        with arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd") as stream:
            yield io.BufferedReader(stream)
    elif ending in _OPENERS:
        with importlib.import_module(_OPENERS[ending]).open(raw) as stream:
            yield stream
    else:
        yield raw


def _archive(
    where: str, stream: IO[bytes], followed: Followed, reading: Reading
) -> Iterator[Record]:
    """The documents of all members in order; archives inside it are not read."""
    for name, content in _members(where, stream, followed, reading):
        if content is None:
            yield BadRecord(f"{where}: {name} is a sparse file: pack it without sparse files")
        else:
            yield from _member(f"{where}: {name}", name, content, reading)


def _members(
    where: str, stream: IO[bytes], followed: Followed, reading: Reading
) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of each member that is read; None for the content of a sparse file."""
    source: Any = _Ending(stream)
    try:
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in iter(archive.next, None):
                followed()
                if member.isdir() or _is_litter(member.name):
                    continue
                kind = _kind(member.name)
                if not member.isfile() or kind not in _KNOWN or kind == _TAR:
                    reading.left_out["link" if not member.isfile() else _ending(member.name)] += 1
                elif member.issparse():
                    # Holes take no space in the archive: nothing bounds the size that it claims.
                    yield member.name, None
                elif content := archive.extractfile(member):
                    yield member.name, content.read()
    # The library raises these for wrong fields of a header.
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise BadRecord(f"{where} is damaged ({error}): get it again") from None


class _Ending:
    """A stream that raises EOFError when it is read again and again behind its end.

    The library would read for years where a member claims to be that large.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._ends = stream, 0

    def read(self, size: int) -> bytes:
        content = self._stream.read(size)
        self._ends += not content
        # The library reads there once or twice in undamaged archives, too.
        if self._ends > 2:
            raise EOFError("it ends inside a member")
        return content


def _member(where: str, name: str, content: bytes, reading: Reading) -> Iterator[Record]:
    """A member's documents; a damaged member is a BadRecord, and the next may be read."""
    try:
        with _reading(where):
            raw = io.BufferedReader(io.BytesIO(content))
            for record in _content(name, raw, where, lambda: None, reading):
                # Read it to its end here, so that damage is noticed before it counts.
                if isinstance(record, Document):
                    record = replace(record, pieces=tuple(record.pieces))
                yield record
    except BadRecord as error:
        yield error


# --- texts ------------------------------------------------------------------------------------


def _text_pieces(where: str, stream: IO[bytes], followed: Followed) -> Iterator[str]:
    """The file's text, cut where no token spans the cut."""
    with _reading(where):
        # With newline=None line ends become \n, as in plain().
        text = io.TextIOWrapper(stream, encoding="utf-8", newline=None)
        left = text.read(_CHUNK).lstrip(BOM)
        more = left
        while more:
            followed()
            if "\0" in more:
                raise BadRecord(
                    f"{where} holds a NUL character, which text cannot have: convert it"
                )
            while end := border(left):
                yield left[:end]
                left = left[end:]
            more = text.read(_CHUNK)
            left += more
        text.detach()
    if left:
        yield left


# --- records ----------------------------------------------------------------------------------


def _documents(found: Iterator[tuple[str, Any]], reading: Reading) -> Iterator[Record]:
    """The document of each record, by where it stands."""
    for where, record in found:
        try:
            yield record if isinstance(record, BadRecord) else document(record, where, reading)
        except BadRecord as error:
            yield error


def _parsed(
    where: str, found: Iterable[tuple[int, bytes]], followed: Followed
) -> Iterator[tuple[str, Any]]:
    """Where each JSON value is, and the value or a BadRecord, from numbers and texts of lines."""
    for line, content in found:
        followed()
        content = content.removeprefix(codecs.BOM_UTF8) if line == 1 else content
        place = f"{where} line {line}"
        if content.strip():
            try:
                yield place, jsonfile.parse(content)
            except ValueError as error:
                problem = jsonfile.reason(error)
                yield place, BadRecord(f"{place} is not JSON ({problem}): correct it")


def _rows(
    where: str, stream: IO[bytes], delimiter: str, followed: Followed, reading: Reading
) -> Iterator[tuple[str, Any]]:
    """The rows of a table with a header, as records whose values are texts."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    # The library's default is 128 KB a value.
    csv.field_size_limit(2**31 - 1)
    table = csv.reader(text, delimiter=delimiter, strict=True)
    names: list[str] = []
    row: list[str] | None = []
    while row is not None:
        followed()
        place = f"{where} line {table.line_num + 1}"
        try:
            row = next(table, None)
            if row and not names:
                names = row
                columns(names, where, reading)
            elif row and len(row) != len(names):
                raise csv.Error(f"{len(row)} values for {len(names)} columns")
            elif row:
                yield place, dict(zip(names, row, strict=True))
        except csv.Error as error:
            wrong = BadRecord(f"{place} is not a row of the table ({error}): correct it")
            if not names:
                raise wrong from None
            yield place, wrong
    text.detach()


def _samples(lines: Iterator[tuple[str, Any]]) -> Iterator[Record]:
    """Synthesized samples that were not dropped; each has its end in its text."""
    for where, line in lines:
        if isinstance(line, BadRecord):
            yield line
        elif not isinstance(line, dict) or not isinstance(line.get("text"), str):
            yield BadRecord(f"{where} is not a sample: synthesize again with `force`")
        elif not line.get("dropped"):
            yield Document(where, pieces(plain(line["text"])), is_closed=True)


def _parquet(where: str, raw: Stream, followed: Followed, reading: Reading) -> Iterator[Record]:
    library = _library("pyarrow", where)
    parquet = importlib.import_module("pyarrow.parquet")

    def rows() -> Iterator[tuple[str, Any]]:
        table = parquet.ParquetFile(raw)
        wanted = columns(table.schema_arrow.names, where, reading)
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                row += 1
                yield f"{where} row {row}", record
            followed()

    try:
        yield from _documents(rows(), reading)
    except library.ArrowException as error:
        raise BadRecord(f"{where} is not a Parquet file ({error}): get it again") from None


def _hub(name: str, reading: Reading) -> Iterator[Record]:
    _library("datasets", name)
    datasets = importlib.import_module("datasets")
    name, _, config = name.partition(":")

    def rows() -> Iterator[tuple[str, Any]]:
        found = datasets.load_dataset(name, config or None, split=reading.split, streaming=True)
        for number, row in enumerate(found, 1):
            yield f"{name} row {number}", row

    try:
        yield from _documents(rows(), reading)
    except SupraError:
        raise
    # A loader may raise anything: no network, no such set or split, a damaged file.
    except Exception as error:
        raise SupraError(
            f"the data set {name} cannot be read ({reason(error)}): check its name, `split` and "
            "the network"
        ) from None


def _library(name: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingDependencyError.of(name, needed_by, "data") from None
