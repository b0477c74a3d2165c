"""Text to train on: every format the same tokens, nothing lost, nothing twice."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.data import documents, json_values, prepare, record
from supra_core.data.prepare import Settings
from supra_core.errors import FormatError, SupraError
from supra_core.measure.tasks import tasks_of
from supra_core.sources.source import open_source
from supra_core.text import read_text
from tests.core.corpora import (
    ASSETS,
    END,
    TALK,
    TEXTS,
    VOCABULARY,
    as_archive,
    ids_of,
    lines,
    prepared,
    split,
    with_template,
    write_archive,
    write_gzip,
    write_lines,
    write_parquet,
    write_texts,
    write_zstandard,
)
from tests.tiny_tokenizers import SPECIAL, byte_level, with_bos


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


@pytest.mark.parametrize("name", ["a.json", "a.csv.gz", "a.parquet", "a.ndjson"])
def test_records_are_not_measured_as_one_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds records, not one text"):
        tasks_of(tmp_path / name)


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
