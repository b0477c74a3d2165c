"""Stores of tokens: whole, resumed after an interrupt, checked for damage."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.data import prepare
from supra_core.data.store import ShardWriter, TokenStore, type_for, write_index
from supra_core.errors import FormatError, SupraError
from tests.core.corpora import TEXTS, ids_of, lines, prepared, split, write_texts


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
