"""What a run reads: every sequence once an epoch, texts in their shares."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_core.data import prepare  # noqa: E402
from supra_core.data.store import ShardWriter, TokenStore, write_index  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_torch.recipes.config import DataPart, UptrainConfig, resolve  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.data import Mixture, Sequences, _noted, mixture  # noqa: E402
from tests.torch.uptraining import SETTINGS  # noqa: E402


def test_every_sequence_once_an_epoch() -> None:
    tokens = np.arange(1030, dtype=np.uint32)
    sequences = Sequences(tokens, length=10, seed=5)
    trained = sequences.count - sequences.held_out_count
    first = [int(sequences.sequence(number).ids[0, 0]) for number in range(trained)]
    second = [int(sequences.sequence(number).ids[0, 0]) for number in range(trained, 2 * trained)]
    held_out = {int(row[0]) for row in sequences.held_out().ids}
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(first)) == trained
    assert not held_out & set(first)


def test_cut_sequences_are_the_same_tokens() -> None:
    data = _mixture([None], 1030)
    whole = data.batch(20, 3).ids
    np.testing.assert_array_equal(data.batch(20, 6, cut=2).ids.reshape(3, 10), whole)
    # 21 tokens were seen: the row that begins within them is left out.
    np.testing.assert_array_equal(data.batch(21, 1, cut=2).ids, whole[:1, 5:])


def _store(folder: Path, lengths: list[int], shard_documents: int) -> TokenStore:
    """Documents of these lengths; every token is its own place in the whole."""
    shards, place = [], 0
    for number, first in enumerate(range(0, len(lengths), shard_documents)):
        writer = ShardWriter(folder, number, "uint32")
        for length in lengths[first : first + shard_documents]:
            writer.begin_document()
            writer.add(np.arange(place, place + length))
            place += length
        shards.append(writer.finish())
    write_index(folder, shards, {"dtype": "uint32", "tokenizer": ""})
    return TokenStore(folder)


@given(
    lengths=st.lists(st.integers(1, 25), min_size=12, max_size=60),
    shard_documents=st.integers(1, 30),
    length=st.sampled_from([6, 12]),
    cut=st.sampled_from([1, 2, 3]),
    steps_by_process=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=4),
    seed=st.integers(0, 9),
)
def test_every_token_once_an_epoch_for_any_processes_and_resumes(
    lengths: list[int], shard_documents: int, length: int, cut: int,
    steps_by_process: list[tuple[int, int]], seed: int,
) -> None:  # fmt: skip
    """Begun, and three times or more resumed, each time with 1, 2 or 3 processes."""
    lengths = [*lengths, 4 * length]
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), lengths, shard_documents)
        data = mixture([DataPart(path="text")], [store], length, seed)
        (text,) = data.parts
        epoch = text.trained_tokens
        # Six rows a step, which any of the three numbers of processes shares.
        rows, row_length = 6, length // cut
        taken: list[int] = []
        begins: set[int] = set()
        seen, resumes = 0, iter(steps_by_process)
        while len(taken) < 2 * epoch:
            # The last number of processes goes on to the end.
            size, steps = next(resumes, (steps_by_process[-1][0], 10**9))
            for _ in range(min(steps, -(-(2 * epoch - seen) // (rows * row_length)))):
                own = rows // size
                for rank in range(size):
                    part = data.batch(seen, rows, cut, slice(rank * own, (rank + 1) * own))
                    assert part.begins[:, 0].all()
                    taken.extend(part.ids.flatten().tolist())
                    begins.update(part.ids[part.begins].tolist())
                seen += rows * row_length
        assert sorted(taken[:epoch]) == list(range(epoch))
        assert sorted(taken[epoch : 2 * epoch]) == list(range(epoch))
        assert text.held_out().ids.min() >= epoch
        # Documents begin where they were stored to begin, and where rows do.
        starts = {int(x) for x in np.cumsum([0, *lengths[:-1]]) if x < epoch}
        assert {x for x in begins if x < epoch} == starts | set(range(0, epoch, row_length))


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    shard_documents=st.integers(1, 10),
    length=st.integers(1, 12),
)
def test_the_most_documents_of_a_row(lengths: list[int], shard_documents: int, length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), lengths, shard_documents)
        starts = np.cumsum([0, *lengths[:-1]])
        inside = [
            1 + int(((starts > first) & (starts < first + length)).sum())
            for first in range(0, len(store), length)
        ]
        assert store.most_documents(length) == max(inside)


@given(lengths=st.lists(st.integers(1, 9), min_size=8, max_size=40), cut=st.sampled_from([1, 2]))
def test_rows_inside_a_document_begin_with_the_lead(lengths: list[int], cut: int) -> None:
    """What Gemma needs, at the cost of one token a row; documents bring their own."""
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), lengths, 3)
        if len(store) < 8:
            return
        starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
        led, plain = (
            Mixture((Sequences(store, 4, 5, lead=lead),), (1.0,)) for lead in (9999, None)
        )
        size = cut * led.parts[0].trained_tokens // 4
        rows, before = led.batch(0, size, cut), plain.batch(0, size, cut)
        np.testing.assert_array_equal(rows.begins, before.begins)
        np.testing.assert_array_equal(rows.ids[:, 1:], before.ids[:, 1:])
        for ours, theirs in zip(rows.ids[:, 0], before.ids[:, 0], strict=True):
            assert ours == (theirs if int(theirs) in starts else 9999)


def _mixture(shares: list[float | None], *sizes: int) -> Mixture:
    """Texts whose tokens say which text (thousands) and where in it."""
    tokens = [np.arange(size, dtype=np.uint32) + 10_000 * i for i, size in enumerate(sizes)]
    parts = [DataPart(path=str(i), share=share) for i, share in enumerate(shares)]
    return mixture(parts, tokens, 10, 5)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([None, 0.25, None], [0.75 * 4 / 7, 0.25, 0.75 * 3 / 7]),
        ([0.5, 0.2, 0.3], [0.5, 0.2, 0.3]),
        ([0.1, 0.1, 0.2], [0.25, 0.25, 0.5]),
    ],
)
def test_a_mixture_keeps_its_shares(shares: list[float | None], expected: list[float]) -> None:
    data = _mixture(shares, 4090, 1030, 3070)
    assert data.shares == pytest.approx(expected, abs=0.01)
    taken: list[list[int]] = [[], [], []]
    for number in range(400):
        part, index = data.source(number)
        taken[part].append(index)
        for own, share in zip(taken, data.shares, strict=True):
            # Parts give their share at any time, not only in the end.
            assert abs(len(own) - share * (number + 1)) < 2.5
    assert all(own == list(range(len(own))) for own in taken)
    # Batches are slices of one order, whatever their size.
    rows = np.concatenate([data.batch(0, 3).ids, data.batch(30, 5).ids])
    np.testing.assert_array_equal(rows, data.batch(0, 8).ids)
    held_out = {int(row[0]) for row in data.held_out().ids}
    assert {start // 10_000 for start in held_out} == {0, 1, 2}
    assert not held_out & {int(row[0]) for row in data.batch(0, 900).ids}


def test_several_texts_train_one_model(
    settings: UptrainConfig, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    config = resolve(
        config=None, model=settings.model, recipe=None, data=[str(text_file), f"{other}:0.25"],
        overrides={**SETTINGS, "tokens": "256"},
    )  # fmt: skip
    run = tmp_path / "run"
    assert uptrain(config, run)["tokens"] >= 192
    assert uptrain(config, run)["already_finished"]
    with pytest.raises(SupraError, match="started with another setting of data"):
        uptrain(config.model_copy(update={"data": str(text_file)}), run)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a:0.7", "b:0.6"], r"field data: the shares add up to 1\.3"),
        (["a:1.0", "b"], "leaves nothing for the others"),
        (["a:2", "b"], "`data` a:2: a share must be above 0 and at most 1"),
    ],
)
def test_impossible_shares_are_named(data: list[str], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        resolve(config=None, model="m", recipe=None, data=data, overrides={})


def test_running_out_of_data_is_said_before_the_run(
    settings: UptrainConfig, tmp_path: Path
) -> None:
    config = settings.model_copy(update={"tokens": 10_000_000})
    with pytest.raises(SupraError, match=r"would read them [\d.e+]+ times.*set epochs=\d+"):
        uptrain(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_missing_data_is_named(settings: UptrainConfig, tmp_path: Path) -> None:
    config = settings.model_copy(update={"data": str(tmp_path / "none.txt")})
    with pytest.raises(SupraError, match=r"none\.txt does not exist"):
        uptrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_text_may_be_given_before_the_first_step(
    settings: UptrainConfig, text_file: Path, tmp_path: Path
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("too short " * 3)
    config = settings.model_copy(update={"data": str(text), "tokens": 128})
    with pytest.raises(SupraError, match=r"text\.txt has .* too few"):
        uptrain(config, run)
    text.write_text(text_file.read_text())
    assert uptrain(config, run)["steps"] == 2
    (run / "summary.json").unlink()
    text.write_text("other")
    with pytest.raises(SupraError, match="not the data this run began with"):
        uptrain(config, run)
    # The text is not to blame for what the run has lost.
    text.write_text(text_file.read_text())
    for lost in (run / "data" / "tokens", run / "data"):
        shutil.rmtree(lost)
        with pytest.raises(SupraError, match=r"run/data, where .*text\.txt, is incomplete"):
            uptrain(config, run)


@pytest.mark.parametrize("content", ["", b"\xff\xfe"])
def test_text_that_is_none_is_named(
    settings: UptrainConfig, tmp_path: Path, content: str | bytes
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SupraError, match=r"text\.txt"):
        uptrain(settings.model_copy(update={"data": str(text)}), tmp_path / "run")


def test_a_run_that_noted_every_file_still_knows_its_data(tmp_path: Path) -> None:
    files = [[f"document-{n:07}.txt", 10_000] for n in range(310_000)]
    note = tmp_path / "data.json"
    note.write_text(json.dumps({"files": files}))
    assert note.stat().st_size > 10_000_000
    stated = prepare.in_short(files)
    assert isinstance(stated, dict) and _noted(note) == {"files": stated}
    note.write_text(json.dumps({"name": "a sum"}))
    assert _noted(note) == {"name": "a sum"}
