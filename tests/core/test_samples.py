"""The folder of samples: whole batches or nothing, and only by the same settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from supra_core.data.synthesis.folder import SampleStore, open_folder
from supra_core.data.synthesis.rows import Sample
from supra_core.data.synthesis.settings import Settings, next_batch
from supra_core.errors import FormatError, SupraError
from supra_core.formats.jsonfile import write_object


def document(text: str, dropped: str = "", tokens: int = 10) -> Sample:
    return Sample("document", text, None, tokens, tokens, True, dropped)


def conversation(text: str, tokens: int = 10) -> Sample:
    messages = [{"role": "user", "content": "é?"}, {"role": "assistant", "content": text}]
    return Sample("conversation", text, messages, tokens, tokens - 2, False, "")


def store(folder: Path) -> SampleStore:
    filled = SampleStore(folder)
    filled.append(0, [document("one.\u2028"), document("", "empty")])
    filled.append(1, [conversation("twö."), conversation("three.")])
    return filled


def test_the_texts_are_the_kept_samples(tmp_path: Path) -> None:
    store(tmp_path).write_texts(tmp_path)
    assert (tmp_path / "documents.txt").read_bytes() == "one.\u2028".encode()
    assert (tmp_path / "conversations.txt").read_text("utf-8") == "twö.three."
    tally = SampleStore(tmp_path).tally()
    assert (tally.batches, tally.rows, tally.total, tally.sampled) == (2, 4, 30, 36)
    assert tally.kept == {"document": 1, "conversation": 2}
    assert tally.finished == {"document": 1, "conversation": 0}
    assert tally.dropped == {"empty": 1}


def test_whatever_a_kill_leaves_is_whole_batches(tmp_path: Path) -> None:
    store(tmp_path)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    first = len(b"".join(whole.splitlines(keepends=True)[:2]))
    ends = [at for at, byte in enumerate(whole) if byte == ord("\n")]
    cuts = {*range(0, len(whole), 19), *(end + 1 for end in ends), *ends, *(e - 1 for e in ends)}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        batches = SampleStore(tmp_path).tally().batches
        assert batches == (cut >= first) + (cut == len(whole))
        assert path.read_bytes() == whole[: (0, first, len(whole))[batches]]


def test_damage_before_the_end_is_said(tmp_path: Path) -> None:
    store(tmp_path)
    path = tmp_path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in ([lines[0], b"{\n", *lines[2:]], [lines[0], b"[]\n", *lines[2:]]):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(FormatError, match="line 2 is damaged"):
            SampleStore(tmp_path)
    for disordered in ([lines[0], b"{}\n"], [lines[0], *lines[2:]]):
        path.write_bytes(b"".join(disordered))
        with pytest.raises(FormatError, match="line 2 is out of order"):
            SampleStore(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    assert not open_folder(tmp_path / "new", {}, force=False)
    assert not open_folder(tmp_path, {}, force=False)
    (tmp_path / "documents.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(SupraError, match=r"no synthesis\.json"):
            open_folder(tmp_path, {}, force=force)
    with pytest.raises(SupraError, match="is a file"):
        open_folder(tmp_path / "documents.txt", {}, force=True)
    assert (tmp_path / "documents.txt").read_text() == "mine"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    store(tmp_path).write_texts(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    write_object(tmp_path / "synthesis.json", {"settings": {"seed": 0, "length": 512}})
    assert open_folder(tmp_path, {"seed": 0, "length": 512}, force=False)
    with pytest.raises(SupraError, match="length 512, not 64"):
        open_folder(tmp_path, {"seed": 0, "length": 64}, force=False)
    assert not open_folder(tmp_path, {"seed": 0, "length": 64}, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_kinds_keep_their_shares(tmp_path: Path) -> None:
    for share in (0.0, 0.25, 1.0):
        settings = Settings(10_000, share, 100, 8, 1.0, 1.0, 0, 1)
        (tmp_path / "samples.jsonl").unlink(missing_ok=True)
        samples = SampleStore(tmp_path)
        while (tally := samples.tally()).total < settings.tokens:
            kind, rows = next_batch(tally, settings)
            assert 1 <= rows <= 8
            make = document if kind == "document" else conversation
            samples.append(tally.batches, [make("x", tokens=60)] * rows)
        assert tally.tokens["conversation"] == pytest.approx(share * tally.total, abs=8 * 60)
        # The last batches are smaller: little more is sampled than was asked for.
        assert tally.total < settings.tokens + 2 * 60
