"""Text to train on that is damaged: named with its file and line, or skipped when asked."""

from __future__ import annotations

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supra_core.data import documents, json_values, record
from supra_core.data.record import Reading
from supra_core.errors import SupraError
from tests.core.corpora import (
    TALK,
    as_archive,
    ids_of,
    lines,
    prepared,
    split,
    write_archive,
    write_gzip,
    write_parquet,
    write_zstandard,
)


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


def test_a_token_beyond_the_vocabulary_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its beginning may be written: it stops even where bad records are left out."""
    monkeypatch.setattr(record, "_PIECE", 10)
    (tmp_path / "a.txt").write_text("x\n" * 40 + "\u2603", encoding="utf-8")
    with pytest.raises(SupraError, match="a.txt: the text has '\u2603'"):
        prepared(tmp_path / "a.txt", out=tmp_path / "out", skip_bad=True)


BAD = {
    '{"text": "x"': r"line 2 is not JSON",
    '"text"': r"line 2 is not an object",
    '{"body": "x", "id": 1}': r"line 2 has no field text, .* but body, id: name one with `field`",
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
            "d.parquet has no column text, .* but id: name one with `field`",
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
