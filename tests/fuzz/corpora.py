"""Files of training text: documents, records that are none, or a file that is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from supra_core.data.documents import records
from supra_core.data.prepare import Settings, _encoded, _renderer, prepare
from supra_core.data.record import BadRecord, Reading
from supra_core.errors import SupraError
from supra_core.text import ModelTokenizer, load_tokenizer
from tests.fuzz.harness import Files, Format, check_line
from tests.fuzz.mutations import Seeded, changed_bytes, changed_value
from tests.tiny_chat import CHATML
from tests.tiny_tokenizers import byte_level

_SIZE = 320
_TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes", "tool_calls": [{"function": {"name": "f"}}]},
]
_RECORDS: tuple[Any, ...] = (
    {"text": "Hello there.\nHow are you?", "id": 3}, {"text": "é\u2581 \U0001f600 <|im_end|>"},
    {"messages": _TALK[:1]}, {"messages": _TALK, "system": "be brief", "tools": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    {"conversations": json.dumps(_TALK)}, {"tokens": [1, 2, 300]}, {"input_ids": "[1, 2]"},
    {"instruction": "add", "input": "1", "output": "2"}, {"instruction": "only"}, [1, 2, 3],
    {"text": "", "messages": None}, {"text": "a\r\nb\rc"}, {"text": "x" * 3000},
)  # fmt: skip
# How a file ends that holds one of the kinds, and the ends of what is packed.
_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", "")


@cache
def _assets() -> dict[str, bytes]:
    return {
        "tokenizer.json": byte_level().to_str().encode(),
        "tokenizer_config.json": json.dumps({"chat_template": CHATML}).encode(),
    }


@cache
def _tokenizer() -> ModelTokenizer:
    """Read and rendered with here: it is no stranger's."""
    known = load_tokenizer(_assets(), "the model", _SIZE)
    return ModelTokenizer(known.raw, known.where, _SIZE, known.template)


def _content(chance: Seeded, ending: str) -> bytes:
    """A file of that kind, with changes in its records or its bytes."""
    found = [chance.one(_RECORDS) for _ in range(chance.number(0, 4))]
    if chance.number(0, 2):
        found = changed_value(chance, {"r": found}).get("r")
    entries = found if isinstance(found, list) else [found]
    if ending == ".jsonl":
        content = "\n".join(map(json.dumps, entries)).encode()
    elif ending == ".json":
        content = json.dumps(found, indent=chance.one((None, 1)), ensure_ascii=True).encode()
    elif ending in (".csv", ".tsv"):
        content = _table(chance, entries, "," if ending == ".csv" else "\t")
    else:
        content = json.dumps(entries).encode()
    kind = chance.number(0, 9)
    if kind < 3:
        content = changed_bytes(chance, content)
    elif kind == 3:
        content = chance.one((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\n\n")) + content
    return content


def _table(chance: Seeded, entries: list[Any], delimiter: str) -> bytes:
    rows = [entry for entry in entries if isinstance(entry, dict)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    table = csv.writer(out, delimiter=delimiter, quoting=chance.one((0, 1)))
    if chance.number(0, 9):
        table.writerow(names)
    for row in rows:
        values = [row.get(name, "") for name in names]
        table.writerow([v if isinstance(v, str) else json.dumps(v) for v in values])
    return out.getvalue().encode("utf-8", "replace")


_KINDS = (b"0", b"0", b"0", b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"L", b"K", b"x", b"g", b"S")
_PAX = (
    "GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize",
    "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.numblocks", "path", "size", "mtime",
)  # fmt: skip


def _archive(chance: Seeded) -> bytes:
    out = io.BytesIO()
    form = chance.one((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for number in range(chance.number(0, 3)):
            name, content = _named(chance, depth=1)
            member = tarfile.TarInfo(chance.one(("", "a/", "../", "/", "._", "é/")) + name)
            member.type, member.linkname = chance.one(_KINDS), chance.one(("", "0.jsonl"))
            member.size, member.mtime = len(content), number
            if form == tarfile.PAX_FORMAT and chance.number(0, 4) == 0:
                values = ("0", "1", "10", "512", "0,3,9,3", str(2**40), "x", "é.txt", "-1")
                some = range(chance.number(1, 4))
                member.pax_headers = {chance.one(_PAX): chance.one(values) for _ in some}
            archive.addfile(member, io.BytesIO(content))
    packed = out.getvalue()
    return _resummed(chance, packed) if chance.number(0, 1) else packed


def _resummed(chance: Seeded, packed: bytes) -> bytes:
    """A header with bytes of it changed, and the sum that belongs to them."""
    header = bytearray(packed[:512])
    if len(header) < 512:
        return packed
    for _ in range(chance.number(1, 3)):
        at = chance.one((0, 100, 124, 124, 135, 136, 156, 257, 345, 386, 398, 482, 483))
        value = chance.one((b"\0", b"\x80", b"\xff" * 8, b"77777777777", b"S", b"5", b"-1", b"x"))
        header[at : at + len(value)] = value
    del header[512:]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + packed[512:]


def _named(chance: Seeded, depth: int = 0) -> tuple[str, bytes]:
    """A file's name and content; an archive at the top only, mostly."""
    kind = chance.number(0, 9)
    if kind < 3 and chance.number(0, 9 if depth else 0) == 0:
        name, content = "a.tar", _archive(chance)
    else:
        ending = chance.one(_ENDINGS[: 4 if kind < 9 else None])
        name, content = f"a{ending}", _content(chance, ending)
    if chance.number(0, 4) == 0:
        name, content = f"{name}.gz", gzip.compress(content, 1, mtime=0)
    if chance.number(0, 4) == 0:
        content = changed_bytes(chance, content, 2)
    return name, content


def _drawn(random: Random) -> tuple[Files, str]:
    name, content = _named(Seeded(random))
    return {name: content}, name


def _read(path: Path) -> object:
    """As ``supra data prepare`` does, with the records that are none left out; some are written."""
    tokenizer = _tokenizer()
    reading = Reading(render=_renderer(tokenizer), vocab_size=_SIZE)
    found = 0
    for batch in _encoded(records(str(path), reading), tokenizer):
        for entry in batch:
            if isinstance(entry, BadRecord):
                check_line(entry)
            else:
                found += 1
                assert not len(entry.ids) or (entry.ids.min() >= 0 and entry.ids.max() < _SIZE)
    if path.stat().st_size % 16 == 0:
        settings = Settings((str(path),), 0, _SIZE, skip_bad=bool(path.stat().st_size % 32))
        with tempfile.TemporaryDirectory() as folder:
            store = prepare(settings, _assets(), Path(folder) / "out")
            store.check()
            assert np.all(store[:] < _SIZE)
    if not found:
        raise SupraError("nothing but records that are none")
    return found


FORMATS = (Format.seeded("records", _drawn, _read),)
