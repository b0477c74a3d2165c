"""Text to train on: every format the same tokens, nothing lost, nothing twice."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from supra_core.data import documents, json_values, prepare, record
from supra_core.data.prepare import Settings
from supra_core.data.record import Reading
from supra_core.data.store import ShardWriter, TokenStore, type_for, write_index
from supra_core.errors import FormatError, SupraError
from supra_core.measure.tasks import task_of
from supra_core.progress import silent
from supra_core.sources.source import open_source
from supra_core.text import read_text
from tests.tiny_tokenizers import SPECIAL, byte_level, with_bos

END = 1
TEXTS = [
    "Hello there.\nHow are you?",
    "x",
    "Zwei Zeilen,\n\nund noch eine: ä ö ü 😀\n",
    "a b " * 50,
]
CHARACTERS = sorted(set("".join(TEXTS)) | set("usertantsym:|\n"))
CHATML = (
    "{% for m in messages %}{% if m.role == 'zero' %}{{ 1 // 0 }}{% endif %}"
    "{% if m.role == 'none' %}{{ raise_exception('not this role') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}|\n{% endfor %}"
)


def with_template(template: str) -> dict[str, bytes]:
    """The only file of a model that has it."""
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


def character_assets() -> dict[str, bytes]:
    """A tokenizer whose tokens are characters, unknown ones 0, and a template."""
    ids = {"<unk>": 0, "<end>": END} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    # The model has no embedding for it.
    ids["\u2603"] = len(ids)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        **with_template(CHATML),
    }


ASSETS = character_assets()
VOCABULARY = len(CHARACTERS) + 2


def ids_of(text: str, *, end: bool = True) -> list[int]:
    ids = [CHARACTERS.index(c) + 2 if c in CHARACTERS else 0 for c in text]
    return [*ids, END] if end else ids


def prepared(*sources: str | Path, out: Path, **settings: Any) -> TokenStore:
    force = settings.pop("force", False)
    progress = settings.pop("progress", silent)
    chosen = {"separator": END, "vocab_size": VOCABULARY, **settings}
    told = Settings(tuple(map(str, sources)), **chosen)
    return prepare.prepare(told, ASSETS, out, force=force, progress=progress)


def split(store: TokenStore) -> list[list[int]]:
    """Every document's ids."""
    borders = [*store.documents(0, len(store)).tolist(), len(store)]
    return [store[a:b].tolist() for a, b in zip(borders, borders[1:], strict=False)]


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_texts(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def write_lines(folder: Path) -> Path:
    (folder / "d.jsonl").write_bytes(lines([{"text": text, "id": 3} for text in TEXTS]) + b"\n\n")
    return folder / "d.jsonl"


def write_gzip(folder: Path) -> Path:
    content = write_lines(folder).read_bytes()
    # Two members, as compressing in parallel makes them.
    (folder / "d.jsonl.gz").write_bytes(
        gzip.compress(content[:70], mtime=0) + gzip.compress(content[70:], mtime=0)
    )
    return folder / "d.jsonl.gz"


def write_zstandard(folder: Path) -> Path:
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    content = write_lines(folder).read_bytes()
    frames = [codec.compress(part, asbytes=True) for part in (content[:70], content[70:])]
    (folder / "d.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "d.jsonl.zst"


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, folder / "d.parquet", row_group_size=3)
    return folder / "d.parquet"


def write_archive(folder: Path) -> Path:
    with tarfile.open(folder / "d.tar", "w") as archive:
        for number, text in enumerate(TEXTS):
            name, content = f"{number}.txt", text.encode()
            if number % 2:
                name, content = f"{number}.json.gz", gzip.compress(lines([{"text": text}]), mtime=0)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "d.tar"


def write_compressed_archive(folder: Path) -> Path:
    (folder / "d.tar.gz").write_bytes(gzip.compress(write_archive(folder).read_bytes(), mtime=0))
    return folder / "d.tar.gz"


WRITERS = (
    write_texts, write_lines, write_gzip, write_zstandard, write_parquet, write_archive,
    write_compressed_archive,
)  # fmt: skip


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__[6:])
def test_every_format_is_the_same_documents(write: Callable[[Path], Path], tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    store = prepared(write(given), out=tmp_path / "out")
    assert split(store) == [ids_of(text) for text in TEXTS]
    assert store.index["documents"] == len(TEXTS)
    assert store.index["dtype"] == "uint16"


WRITTEN = "Hello there.\nHow are you?\n\nAnd note: ä\n"


def as_table(records: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(records)
    return file.getvalue().encode()


def as_parquet(records: Sequence[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    table = pytest.importorskip("pyarrow").Table.from_pylist(list(records))
    pytest.importorskip("pyarrow.parquet").write_table(table, file)
    return file.getvalue()


def as_archive(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zstandard(content: bytes) -> bytes:
    return bytes(pytest.importorskip("pyarrow").Codec("zstd").compress(content, asbytes=True))


# Ending -> records of texts as a file of it; UTF-8's own mark may stand before what is marked.
CONTAINERS: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    "jsonl": lines,
    "ndjson.bz2": lambda records: bz2.compress(lines(records)),
    "json": lambda records: json.dumps(records, indent=1).encode(),
    "json.gz": lambda records: gzip.compress(lines(records), mtime=0),
    "csv": as_table,
    "tsv.xz": lambda records: lzma.compress(as_table(records, "\t")),
    "parquet": as_parquet,
    "tar": lambda records: as_archive({"a.jsonl.gz": gzip.compress(lines(records), mtime=0)}),
    "tgz": lambda records: gzip.compress(as_archive({"./b/a.csv": as_table(records)})),
    "tar.zst": lambda records: zstandard(as_archive({"a.parquet": as_parquet(records)})),
    "jsonl.zst": lambda records: zstandard(lines(records)),
}
TEXT_FILES: dict[str, Callable[[bytes], bytes]] = {
    "txt": bytes, "md": bytes, "": bytes, "txt.gz": gzip.compress, "rst.xz": lzma.compress,
    "txt.bz2": bz2.compress, "txt.zst": zstandard, "tar": lambda text: as_archive({"a.txt": text}),
}  # fmt: skip
FORMS = {
    "\\n": WRITTEN,
    "\\r\\n": WRITTEN.replace("\n", "\r\n"),
    "\\r": WRITTEN.replace("\n", "\r"),
    "mark": "\ufeff" + WRITTEN,
    "mark, \\r\\n": "\ufeff" + WRITTEN.replace("\n", "\r\n"),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_text_has_the_same_tokens(form: str, tmp_path: Path) -> None:
    """Whatever it lies in, and however its lines end."""
    text = FORMS[form]
    expected = [ids_of(WRITTEN)]
    for ending, write in CONTAINERS.items():
        file = tmp_path / f"records.{ending}"
        file.write_bytes(write([{"text": text}]))
        assert split(prepared(file, out=tmp_path / "out", force=True)) == expected, ending
    for ending, compress in TEXT_FILES.items():
        file = tmp_path / (f"text.{ending}" if ending else "text")
        file.write_bytes(compress(text.encode()))
        assert split(prepared(file, out=tmp_path / "out", force=True)) == expected, ending
    assert read_text(tmp_path / "text.txt") == WRITTEN


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_file_of_records_may_begin_with_a_mark(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"d.{ending}"
    file.write_bytes(b"\xef\xbb\xbf" + CONTAINERS[ending]([{"text": "x"}, {"text": "a"}]))
    assert split(prepared(file, out=tmp_path / "out")) == [ids_of("x"), ids_of("a")]


TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "n"}]
SAID = "user:a?|\nassistant:n|\n"
CONVERSATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"text": None, "messages": TALK}, SAID),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}]},
        "user:a\na|\n",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "n"}]},
        SAID,
    ),
    "alpaca": ({"instruction": "a?", "input": "", "output": "n"}, SAID),
    "alpaca with input": (
        {"instruction": "a?", "input": "x\r\ny", "output": "n", "system": "so"},
        "system:so|\nuser:a?\n\nx\ny|\nassistant:n|\n",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_of_every_form(name: str, tmp_path: Path) -> None:
    """In every container; a table has its messages as JSON."""
    record, said = CONVERSATIONS[name]
    flat = {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
    for ending, write in CONTAINERS.items():
        is_table = "csv" in ending or "tsv" in ending or ending == "tgz"
        file = tmp_path / f"d.{ending}"
        file.write_bytes(write([flat if is_table else record] * 2))
        store = prepared(file, out=tmp_path / "out", force=True)
        assert split(store) == [ids_of(said, end=False)] * 2, ending


def test_rows_that_have_their_document_in_different_columns(tmp_path: Path) -> None:
    rows = [{"text": "x", "messages": None}, {"text": None, "messages": TALK}]
    (tmp_path / "d.parquet").write_bytes(as_parquet(rows))
    store = prepared(tmp_path / "d.parquet", out=tmp_path / "out")
    assert split(store) == [ids_of("x"), ids_of(SAID, end=False)]


def test_tool_calls_are_the_templates(tmp_path: Path) -> None:
    calls = [{"name": "f"}]
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": calls}]
    (tmp_path / "d.jsonl").write_bytes(lines([{"messages": talk}]))
    shown = (
        "{% for m in messages %}{{ m.content or '' }}"
        "{% for call in m.tool_calls or [] %}<{{ call.name }}>{% endfor %}{% endfor %}"
    )
    assets = {**ASSETS, **with_template(shown)}
    told = Settings((str(tmp_path / "d.jsonl"),), END, VOCABULARY)
    store = prepare.prepare(told, assets, tmp_path / "out")
    assert split(store) == [ids_of("a?<f>", end=False)]


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_bytes(lines([{"messages": TALK}]))
    with pytest.raises(SupraError, match="line 1: messages is a conversation, but the model has"):
        list(documents.records(str(tmp_path / "d.jsonl"), Reading()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"},\n {"text": 3}, {"text": "a"}]', "line 2: text is neither"),
        ('[{"text": "x"},\n\n {"text" "b"}\n, {"text": "a"}]', "line 3 is not JSON"),
        ('[{"text": "x"},, {"text": "a"}]', "line 1 is not JSON"),
        ('[{"text": "x"}}, {"text": "a"}]', None),
        ('[{"text": "x"}, {"text": "a"}', None),
        ('[{"text": "x"}, {"text": "a', None),
        ('{"text": "x"} ] {"text": "a"}', "line 1 is not JSON"),
        ('[{"text": "x"}, {"text": "a"}]\n3', "line 2 is not an object"),
        ('{"text": "x"}\n{"text": "a"}\n{"text": "b', "line 3 is not JSON"),
    ],
)
def test_json_that_is_wrong_in_one_place(
    content: str, message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: as a whole."""
    file = tmp_path / "d.json"
    file.write_text(content)
    for chunk in (1, 3, 1000):
        monkeypatch.setattr(json_values, "_CHUNK", chunk)
        with pytest.raises(SupraError, match=message or "d.json"):
            prepared(file, out=tmp_path / "out")
        if message:
            store = prepared(file, out=tmp_path / "out", skip_bad=True)
            assert split(store) == [ids_of("x"), ids_of("a")]
            assert store.index["skipped"] == 1
            shutil.rmtree(tmp_path / "out")


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.dictionaries(
            st.text(), st.recursive(st.none() | st.text(), st.lists, max_leaves=5), max_size=3
        ),
        min_size=1,
    ),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    is_array=st.booleans(),
)
def test_values_of_a_file_are_those_of_the_whole(
    values: list[Any], chunk: int, indent: int | None, is_array: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    if not is_array:
        text = "\n".join(json.dumps(value, indent=indent) for value in values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", chunk)
        found = list(json_values.values(io.BytesIO(text.encode("utf-8", "surrogatepass"))))
    assert [json.loads(content) for _, content in found] == values
    lines_of = text.split("\n")
    assert all(lines_of[line - 1].strip(" [")[:1] == "{" for line, _ in found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,id\nx,1\n"a""b\n', "line 3 is not a row of the table"),
        ("text,id\nx,1\na,b,c\n", "line 3 is not a row of the table \\(3 values for 2 columns\\)"),
        ("text,id\nx,1\na\n", "line 3 is not a row of the table \\(1 values for 2 columns\\)"),
        ("text,id\nx,1\na\0b,2\n", "line 3: text holds a NUL character"),
    ],
)
def test_a_bad_row_of_a_table(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "d.csv"
    file.write_text(content)
    with pytest.raises(SupraError, match=message):
        prepared(file, out=tmp_path / "out")
    store = prepared(file, out=tmp_path / "out", skip_bad=True)
    assert split(store) == [ids_of("x")]
    assert store.index["skipped"] == 1


def test_a_long_value_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(as_table([{"text": "x" * 200_000}]))
    assert len(prepared(tmp_path / "d.csv", out=tmp_path / "out")) == 200_001


MEMBERS = {
    "._0.txt": b"\0", "__MACOSX/0.txt": b"\0", "PaxHeader/0.txt": b"\0", ".hidden/0.txt": b"\0",
    "0.txt": b"x", "1.jpg": b"\0", "2.JPG": b"\0", "3.xml": b"<a/>", "4.zip": b"PK", "README": b"x",
    "5.parquet.gz": b"",
}  # fmt: skip
NOT_READ = {".jpg": 2, ".parquet.gz": 1, ".xml": 1, ".zip": 1, "without an ending": 1}


@pytest.mark.parametrize("is_archive", [True, False])
def test_what_is_not_read_is_counted(is_archive: bool, tmp_path: Path) -> None:
    given = tmp_path / "given.tar"
    if is_archive:
        given.write_bytes(as_archive({**MEMBERS, "6.tar": b""}))
    for name, content in MEMBERS.items():
        if not is_archive and "/" not in name:
            given.mkdir(exist_ok=True)
            (given / name).write_bytes(content)
    if not is_archive:
        (given / "more").mkdir()
    store = prepared(given, out=tmp_path / "out")
    assert split(store) == [ids_of("x")]
    assert store.index["left_out"] == NOT_READ | ({".tar": 1} if is_archive else {"folder": 1})
    assert documents.in_words({".b": 1, ".c": 1000, ".a": 1}) == "1,000 .c, 1 .a, 1 .b"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
        ("a.txt", "ab".encode("utf-16"), "a.txt is UTF-16, not UTF-8"),
        ("a.txt", b"a\0b\0", "a.txt holds a NUL character"),
        ("a.csv", "text\na".encode("utf-16"), "a.csv is UTF-16, not UTF-8"),
        (
            "a.jsonl.gz",
            gzip.compress(lines([{"text": "a"}] * 99), mtime=0)[:-9],
            "a.jsonl.gz is damaged",
        ),
        ("a.json.bz2", b"nothing", "a.json.bz2 cannot be read"),
        ("a.txt.xz", b"nothing", "a.txt.xz is damaged"),
        ("a.csv", b"id\n1\n", "a.csv has no column text"),
        (
            "a.csv",
            b"text;n\nhello;1\n",
            "a.csv has one column, .text;n., in which .;.",
        ),
    ],
)
def test_a_damaged_file_or_member(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    """A file stops; a member of an archive is a bad record."""
    (tmp_path / name).write_bytes(content)
    for skip_bad in (False, True):
        with pytest.raises(SupraError, match=message):
            prepared(tmp_path / name, out=tmp_path / "out", skip_bad=skip_bad)
    archive = tmp_path / "d.tar"
    archive.write_bytes(as_archive({"0.txt": b"x", name: content, "z.txt": b"n"}))
    with pytest.raises(SupraError, match=f"d.tar: {message}"):
        prepared(archive, out=tmp_path / "out")
    store = prepared(archive, out=tmp_path / "out", skip_bad=True)
    assert split(store)[0] == ids_of("x") and split(store)[-1] == ids_of("n")
    assert store.index["skipped"] == 1


def _with_member(**fields: Any) -> bytes:
    """An archive of two texts, the fields of the second one's header as given."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, more in (("0.txt", {}), ("a.txt", fields)):
            member = tarfile.TarInfo(name)
            member.size = 1
            for field, value in more.items():
                setattr(member, field, value)
            archive.addfile(member, None if member.size > 1 else io.BytesIO(b"x"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pax_headers": {"GNU.sparse.size": "x"}}, "is damaged .invalid literal"),
        ({"pax_headers": {"GNU.sparse.map": "0,a"}}, "is damaged .invalid literal"),
        ({"size": 2**60, "name": "a.jpg"}, "is damaged .it ends inside a member"),
        ({"size": 2**60}, "is damaged"),
        ({"pax_headers": {"GNU.sparse.map": f"{2**40},1"}}, "a.txt is a sparse file: pack it"),
    ],
)
def test_archives_whose_headers_claim_anything(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """None is read on and on, or given the memory that it says it needs."""
    packed = _with_member(**fields)
    for name, content in (("d.tar", packed), ("d.tar.gz", gzip.compress(packed, mtime=0))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SupraError, match=f"{name}:? {message}"):
            prepared(tmp_path / name, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["a.py", "a.zip", "a.txt.rar", "a.parquet.gz", "a.2024"])
def test_an_ending_that_is_not_known(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(SupraError, match="which is not read as text: .*.jsonl, .*.parquet.* .zst"):
        prepared(tmp_path / name, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["a.json", "a.csv.gz", "a.parquet", "a.ndjson"])
def test_records_are_not_measured_as_one_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds records, not one text"):
        task_of(tmp_path / name)


def test_a_token_beyond_the_vocabulary_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning may be written: it stops even where bad records are left out."""
    monkeypatch.setattr(record, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("x\n" * 40 + "\u2603", encoding="utf-8")
    with pytest.raises(SupraError, match="a.txt: the text has '\u2603'"):
        prepared(tmp_path / "a.txt", out=tmp_path / "out", skip_bad=True)


def test_a_data_set_of_the_hub(tmp_path: Path) -> None:
    """The library takes a folder for one."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set")
    store = prepared(f"hub:{tmp_path / 'set'}", out=tmp_path / "out")
    assert split(store) == [ids_of(text) for text in TEXTS]
    with pytest.raises(SupraError, match="data set .*none cannot be read"):
        prepared(f"hub:{tmp_path / 'none'}", out=tmp_path / "other")


def test_several_sources_in_order(tmp_path: Path) -> None:
    one, other = tmp_path / "1.jsonl", tmp_path / "0.txt"
    one.write_bytes(lines([{"text": "x"}, {"text": ""}, {"text": "a"}]))
    other.write_text("b")
    store = prepared(one, other, out=tmp_path / "out")
    # A document without text is none.
    assert split(store) == [ids_of("x"), ids_of("a"), ids_of("b")]


def test_conversations_and_token_ids_end_themselves(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "n"}]
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines([{"messages": talk}, {"tokens": [5, 6, 7]}, [3, 4]]))
    expected = [ids_of("user:a?|\nassistant:n|\n", end=False), [5, 6, 7], [3, 4]]
    assert split(prepared(file, out=tmp_path / "out")) == expected


def test_another_field(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines([{"text": "no", "body": "x"}]))
    assert split(prepared(file, out=tmp_path / "out", field="body")) == [ids_of("x")]


BAD = {
    '{"text": "x"': r"line 2 is not JSON",
    '"text"': r"line 2 is not an object",
    '{"body": "x", "id": 1}': r"line 2 has no field text, .* but body, id: name the field",
    '{"text": 3}': r"line 2: text is neither text nor messages",
    '{"messages": [{"role": "user"}]}': r"line 2: messages has a message without",
    '{"messages": [{"role": "user", "content": "x"}, 3]}': r"line 2: messages has a message",
    '{"tokens": [1, 100000]}': r"line 2: tokens is not a list of token ids from 0 to \d+",
    '{"tokens": [1, -1]}': r"line 2: tokens is not a list",
    '{"tokens": [1, true]}': r"line 2: tokens is not a list",
    "[" * 100_000: r"line 2 is not JSON .*levels deep",
    b"\xff\xfe": r"line 2 is not JSON \(it is not UTF-8\)",
    '{"text": null}': r"line 2: text is null",
    '{"text": null, "messages": null}': r"line 2: text is null",
    '{"text": "cut \\ud83d"}': r"line 2 is not JSON \(half of a surrogate pair",
    '{"text": "a\\u0000b"}': r"line 2: text holds a NUL character",
    '{"id": ' + "9" * 5000 + "}": r"line 2 is not JSON .*5000 digits\)",
    '{"messages": [{"role": "user", "content": "\\u0000"}]}': r"messages holds a NUL character",
    '{"messages": ["a"]}': r"line 2: messages has a message without",
    '{"messages": [{"role": ["user"], "content": "x"}]}': r"line 2: messages has a message",
    '{"messages": [{"role": "user", "content": null}]}': r"line 2: messages has a message",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': r"a part of type 'image'",
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': r"messages has a message",
    '{"messages": [{"role": "zero", "content": "x"}]}': r"messages: .*rendered \(.* by zero\)",
    '{"messages": [{"role": "none", "content": "x"}]}': r"refuses these messages: not this role",
    '{"messages": [{"role": "user", "content": null, "tool_calls": [{"name": "f"}]}]}': (
        r"line 2: messages: the chat template has no place for tool calls"
    ),
    '{"messages": "a: b"}': r"line 2: messages is not JSON",
    '{"conversations": [{"from": "nobody", "value": "x"}]}': r"is from 'nobody', not human, gpt",
    '{"conversations": [{"from": "human"}]}': r"line 2: conversations has a message without",
    '{"instruction": "x", "output": 3}': r"line 2: instruction, input and output must be texts",
    '{"text": "\u2603"}': r"text: the text has '\u2603', token \d+, for which",
}


@pytest.mark.parametrize(("line", "message"), list(BAD.items()), ids=range(len(BAD)))
def test_a_bad_record_is_named_or_left_out(line: str | bytes, message: str, tmp_path: Path) -> None:
    file, out = tmp_path / "d.jsonl", tmp_path / "out"
    raw = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(b'{"text": "a"}\n' + raw + b'\n{"text": "b"}\n')
    with pytest.raises(SupraError, match=message):
        prepared(file, out=out)
    assert not out.exists()
    store = prepared(file, out=out, skip_bad=True)
    assert split(store) == [ids_of("a"), ids_of("b")]
    assert store.index["skipped"] == 1
    assert len(store.index["skipped_first"]) == 1


def damaged_parquet(folder: Path) -> Path:
    file = write_parquet(folder)
    file.write_bytes(file.read_bytes()[:-20])
    return file


def without_column(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"id": [1]}), folder / "d.parquet"
    )
    return folder / "d.parquet"


def cut(write: Callable[[Path], Path], end: int) -> Callable[[Path], Path]:
    def damaged(folder: Path) -> Path:
        file = write(folder)
        file.write_bytes(file.read_bytes()[:end])
        return file

    return damaged


def no_text(folder: Path) -> Path:
    (folder / "latin.txt").write_bytes(b"caf\xe9 ")
    return folder / "latin.txt"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (damaged_parquet, "d.parquet is not a Parquet file"),
        (
            without_column,
            "d.parquet has no column text, .* but id: name the field to read",
        ),
        (cut(write_gzip, -15), "d.jsonl.gz is damaged"),
        (cut(write_zstandard, -15), "d.jsonl.zst"),
        (cut(write_archive, 700), "d.tar is damaged"),
        (no_text, "latin.txt is not UTF-8 text"),
        (lambda folder: folder / "none.txt", "none.txt does not exist"),
        (lambda folder: folder, "holds no file that ends in"),
    ],
)
def test_what_cannot_be_read_is_named(
    write: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(SupraError, match=message):
        prepared(write(given), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_pieces_have_the_tokens_of_the_whole(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool
) -> None:
    monkeypatch.setattr(record, "_PIECE", 300)
    monkeypatch.setattr(documents, "_CHUNK", 300)
    lines = [f"Line {i}: ä 😀,\n\n  and {'more ' * (i % 7)}\n of it.\nSo\n" for i in range(200)]
    # At the end there are no lines: it is cut where a token may span the border.
    text = "".join(lines) + "no end " * 1000
    file = tmp_path / ("text.txt.gz" if compress else "text.txt")
    file.write_bytes(gzip.compress(text.encode(), mtime=0) if compress else text.encode())
    source = open_source(smollm2_gguf)
    told = Settings((str(file),), None, source.spec.vocab_size)
    store = prepare.prepare(told, source.assets(), tmp_path / "out")
    tokenizer = source.tokenizer().raw
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert len(list(documents.pieces(text))) > 10
    found = store[0 : len(store)].tolist()
    before = len(tokenizer.encode("".join(lines), add_special_tokens=False))
    assert found[: before - 1] == whole[: before - 1]
    assert tokenizer.decode(found, skip_special_tokens=False) == text


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5),
    data=st.data(),
)
def test_a_store_is_its_documents(
    sizes: list[list[int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("store")
    whole: list[int] = []
    starts, shards = [], []
    for number, own in enumerate(sizes):
        writer = ShardWriter(folder, number, "uint32")
        for size in own:
            writer.begin_document()
            starts.append(len(whole))
            ids = np.arange(len(whole), len(whole) + size) * 70_000
            writer.add(ids)
            whole += ids.tolist()
        shards.append(writer.finish())
    write_index(folder, shards, {"dtype": "uint32", "tokenizer": "0"})
    store = TokenStore(folder)
    assert len(store) == len(whole)
    # Where a document is empty it is the next one that begins, and nothing at the end.
    begun = {start for start in starts if start < len(store)}
    assert set(store.documents(0, len(store)).tolist()) == begun
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert store[start:stop].tolist() == whole[start:stop]
    if whole:
        assert store[len(whole) - 1] == whole[-1]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25),
    shard=st.integers(1, 60),
    interrupted=st.lists(st.integers(1, 9), max_size=3),
)
def test_interrupted_and_resumed_is_the_same(
    lengths: list[int],
    shard: int,
    interrupted: list[int],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("prepare")
    file = folder / "d.jsonl"
    file.write_bytes(
        lines([{"text": "x" * n} if n % 5 else {"bad": n} for n in lengths] + [{"text": "a"}])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_BATCH", 2)
        told = {"shard_tokens": shard, "skip_bad": True}
        expected = prepared(file, out=folder / "whole", **told)
        for calls in interrupted:
            left = iter(range(calls))

            def stop(*_: Any, left: Any = left, **__: Any) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt

            try:
                prepared(file, out=folder / "out", progress=stop, force=True, **told)
            except KeyboardInterrupt:
                assert not (folder / "out").exists()
            else:
                break
        found = prepared(file, out=folder / "out", force=True, **told)
    assert found.index == expected.index
    assert all(shard.tokens <= shard_limit(shard, found) for shard in found.shards)
    files = {path.name for path in expected.folder.iterdir()}
    assert files == {path.name for path in found.folder.iterdir()}
    for name in files:
        assert (found.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert not list(folder.glob(".*preparing"))


def shard_limit(shard: Any, store: TokenStore) -> int:
    """The stated size, and one document over it."""
    return int(store.index["shard_tokens"]) + 31


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(lines([{"text": "a"}, {"text": "b"}]))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(file, out=tmp_path / "out", shard_tokens=1, progress=stop)
    file.write_bytes(lines([{"text": "x"}]))
    assert split(prepared(file, out=tmp_path / "out", shard_tokens=1)) == [ids_of("x")]


def test_existing_output_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    prepared(file, out=tmp_path / "out")
    file.write_text("b")
    with pytest.raises(SupraError, match="exists already"):
        prepared(file, out=tmp_path / "out")
    assert split(TokenStore(tmp_path / "out")) == [ids_of("a")]
    assert split(prepared(file, out=tmp_path / "out", force=True)) == [ids_of("b")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(SupraError, match="not replaced even by force"):
        prepared(file, out=tmp_path / "mine", force=True)


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc")
    whole = prepared(file, out=tmp_path / "whole").folder
    index = json.loads((whole / "index.json").read_text())

    def damaged(name: str, change: Callable[[Path], Any]) -> Path:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "damaged")
        change(tmp_path / "damaged" / name)
        return tmp_path / "damaged"

    def said(**changes: Any) -> Callable[[Path], Any]:
        return lambda file: file.write_text(json.dumps({**index, **changes}))

    cases: list[tuple[str, Callable[[Path], Any], str]] = [
        ("tokens-00000.bin", lambda file: file.write_bytes(b"x"), "has 1 bytes, not 8"),
        ("documents-00000.bin", Path.unlink, "is missing"),
        ("index.json", lambda file: file.write_text("{"), "is not valid JSON"),
        ("index.json", said(format="other"), "is not a prepared text"),
        ("index.json", said(version=9), "version 9 is not known"),
        ("index.json", said(dtype="int8"), "int8"),
        ("index.json", said(shards=[{"tokens": 1}]), "prepare the text again"),
    ]
    for name, change, message in cases:
        with pytest.raises(FormatError, match=message):
            TokenStore(damaged(name, change))


_ODD: tuple[Any, ...] = (None, True, -1, 1.5, "5", "x", [], {}, [[]], [5], 2**70, {"a": 1})


def test_an_index_of_any_other_kind_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    store = prepared(tmp_path / "a.txt", out=tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    (shard,) = index["shards"]
    cases = [{**index, name: odd} for name in ("format", "version", "dtype") for odd in _ODD]
    cases += [{**index, "shards": odd} for odd in _ODD if odd not in ([], {})]
    cases += [
        {**index, "shards": [{**shard, name: odd}]}
        for name in shard
        for odd in _ODD
        if not (isinstance(odd, str) and "sha256" in name)
        and not (odd is None and name == "documents_sha256")
    ]
    cases += [{**index, "shards": [{**shard, "unknown": 1}]}]
    cases += [{k: v for k, v in index.items() if k != name} for name in ("shards", "tokenizer")]
    for case in cases:
        (tmp_path / "out" / "index.json").write_text(json.dumps(case))
        with pytest.raises(FormatError, match=r"out.*(prepare the text again|another folder)"):
            TokenStore(tmp_path / "out")
    assert store.shards[0].tokens == 4


def test_every_byte_of_a_shard_has_its_sum(tmp_path: Path) -> None:
    write_texts(tmp_path)
    store = prepared(*(tmp_path / f"{n}.txt" for n in range(4)), out=tmp_path / "out")
    store.check()
    for file in sorted(store.folder.glob("*.bin")):
        whole = file.read_bytes()
        for at in range(len(whole)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(FormatError, match=rf"{file.name} is not as it was written: prepar"):
                TokenStore(store.folder).check()
        file.write_bytes(whole)


def test_a_folder_of_an_older_version_has_sums_of_tokens_alone(tmp_path: Path) -> None:
    write_texts(tmp_path)
    store = prepared(*(tmp_path / f"{n}.txt" for n in range(4)), out=tmp_path / "out")
    index = json.loads((store.folder / "index.json").read_text())
    del index["shards"][0]["documents_sha256"]
    (store.folder / "index.json").write_text(json.dumps(index))
    older = TokenStore(store.folder)
    older.check()
    assert older.name == store.name
    file = store.folder / "documents-00000.bin"
    file.write_bytes(file.read_bytes()[8:] + bytes(8))
    with pytest.raises(FormatError, match="does not say where documents begin: prepare the text"):
        TokenStore(store.folder).check()


def _interrupted(given: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The position of a call that was stopped after a shard."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_BATCH", 2)
    with pytest.raises(KeyboardInterrupt):
        prepared(given, out=out, shard_tokens=1, progress=stop)
    return out.with_name(f".{out.name}.preparing") / "position.json"


def test_a_position_of_any_other_kind_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "given").mkdir()
    given = write_texts(tmp_path / "given")
    file = _interrupted(given, tmp_path / "out", monkeypatch)
    whole = json.loads(file.read_text())
    odd = [value for value in _ODD if value not in ([], {})]
    cases = [{**whole, name: value} for name in whole for value in odd]
    cases += [{**whole, "shards": [{**whole["shards"][0], "tokens": value}]} for value in odd]
    cases += [{**whole, "facts": {**whole["facts"], "files": 5}}]
    for case in cases:
        file.write_text(json.dumps(case))
        try:
            prepared(given, out=tmp_path / "out", shard_tokens=1)
        except FormatError as error:
            said = str(error)
        else:
            # Another call's facts: it is begun anew.
            assert case["facts"] != whole["facts"]
            shutil.rmtree(tmp_path / "out")
            _interrupted(given, tmp_path / "out", monkeypatch)
            continue
        assert re.search("position.json: .*: remove .*preparing, to prepare the text from", said)


def test_two_at_one_place_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("xyz")
    out = tmp_path / "out"
    refused: list[str] = []

    def meanwhile(*_: Any) -> None:
        for force in (False, True):
            with pytest.raises(SupraError, match="out is being prepared by another process") as e:
                prepared(tmp_path / "b.txt", out=out, force=force)
            refused.append(str(e.value))

    store = prepared(tmp_path / "a.txt", out=out, progress=meanwhile)
    assert refused
    assert split(store) == [ids_of("abc")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt", "out"]


@pytest.mark.parametrize(("size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_smaller_type(size: int, name: str) -> None:
    assert type_for(size) == name


def summed(files: list[list[Any]]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return {"count": len(files), "bytes": sum(size for _, size in files), "sha256": digest}


def test_of_very_many_files_no_single_one_is_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    write_texts(given)
    every = [[f"{n}.txt", (given / f"{n}.txt").stat().st_size] for n in range(len(TEXTS))]
    assert prepared(given, out=tmp_path / "few").index["files"] == every
    monkeypatch.setattr(prepare, "_LISTED", len(TEXTS) - 1)
    told: list[int] = []
    store = prepared(given, out=tmp_path / "many", progress=lambda *to: told.append(to[2]))
    assert store.index["files"] == summed(every)
    assert split(store) == [ids_of(text) for text in TEXTS]
    assert set(told) == {sum(size for _, size in every)}


def test_what_was_begun_with_every_file_stated_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    write_texts(given)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "_BATCH", 2)
    with pytest.raises(KeyboardInterrupt):
        prepared(given, out=tmp_path / "out", shard_tokens=1, progress=stop)
    begun = json.loads((tmp_path / ".out.preparing" / "position.json").read_text())
    assert len(begun["facts"]["files"]) == len(TEXTS) and begun["records"]
    monkeypatch.setattr(prepare, "_LISTED", 1)
    anew = SimpleNamespace(rmtree=lambda *_, **__: pytest.fail("begun anew"))
    monkeypatch.setattr(prepare, "shutil", anew)
    store = prepared(given, out=tmp_path / "out", shard_tokens=1)
    assert split(store) == [ids_of(text) for text in TEXTS]


def test_an_index_of_very_many_files_is_read(tmp_path: Path) -> None:
    """As older versions wrote it, 50 bytes a file."""
    (tmp_path / "a.txt").write_text("abc")
    store = prepared(tmp_path / "a.txt", out=tmp_path / "out")
    index = store.index | {"files": [[f"document-{n:07}.txt", 10_000] for n in range(200_000)]}
    content = json.dumps(index, indent=2)
    assert len(content) > 10_000_000
    (tmp_path / "out" / "index.json").write_text(content)
    assert TokenStore(tmp_path / "out").index == index


def test_an_output_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "elsewhere" / "tokens").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere" / "tokens")
    assert split(prepared(tmp_path / "a.txt", out=tmp_path / "out")) == [ids_of("abc")]
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["tokens"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "elsewhere", "out"}


def test_documents_begin_as_the_model_needs_it(tmp_path: Path) -> None:
    """Gemma's with BOS; conversations bring their own, and so do token ids."""
    made = with_bos(byte_level(), SPECIAL[1])
    bos, end = made.token_to_id(SPECIAL[1]), made.token_to_id(SPECIAL[0])
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    config = {"bos_token": SPECIAL[1], "chat_template": template}
    assets = {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    data = tmp_path / "data.jsonl"
    talk = [{"role": "user", "content": "c"}]
    lines = [{"text": "a"}, {"text": ""}, {"messages": talk}, {"tokens": [7, 8]}]
    data.write_text("\n".join(map(json.dumps, lines)))
    a, c = (made.encode(letter, add_special_tokens=False).ids for letter in "ac")
    for needs, begin in ((True, [bos]), (False, [])):
        told = Settings((str(data),), end, made.get_vocab_size(), needs_bos=needs)
        store = prepare.prepare(told, assets, tmp_path / str(needs))
        assert store[0 : len(store)].tolist() == [*begin, *a, end, bos, *c, 7, 8]
        assert store.index["begins"] == begin
