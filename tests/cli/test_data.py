"""``supra data synthesize`` as a user runs it: text to train on, whatever comes in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from supra_cli.main import app  # noqa: E402
from supra_core.data.documents import BadRecord, Document, Reading, Record, records  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from tests.tiny_chat import CHATML, write_model  # noqa: E402

runner = CliRunner()
Run = Callable[..., "subprocess.CompletedProcess[str]"]

SETTINGS = ("--tokens", "1200", "--length", "100", "--batch", "8", "--conversations", "0.6")
RESULTS = ("samples.jsonl", "documents.txt", "conversations.txt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "text"
    synthesize(model, out)
    return out


def synthesize(model: Path, out: Path, *more: str) -> dict[str, Any]:
    done = runner.invoke(
        app, ["data", "synthesize", str(model), str(out), *SETTINGS, *more, "--json"]
    )
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def refused(*arguments: str | Path) -> str:
    done = runner.invoke(app, ["data", "synthesize", *map(str, arguments)])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("supra: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    return lines[0]


def test_text_to_train_on(model: Path, whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "synthesis.json").read_text())
    counts = record["counts"]
    assert record["finished"]
    assert record["command"] and record["date"] and record["machine"]["torch"]
    assert record["settings"]["seed"] == 0
    assert 1200 <= sum(counts["tokens"].values()) < 1400
    assert counts["tokens"]["conversation"] == pytest.approx(720, abs=400)
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert (
        len(samples)
        == counts["rows"]
        == sum(counts["kept"].values()) + sum(counts["dropped"].values())
    )
    for kind, name in (("document", "documents.txt"), ("conversation", "conversations.txt")):
        kept = [line["text"] for line in samples if line["kind"] == kind and not line["dropped"]]
        assert (whole / name).read_text() == "".join(kept)
        assert len(kept) == counts["kept"][kind]
    read = list(records(str(whole), Reading()))
    kept = [line for line in samples if not line["dropped"]]
    assert [_text(record) for record in read] == [line["text"] for line in kept]
    data, run = str(whole), tmp_path / "run"
    done = runner.invoke(
        app,
        [
            "uptrain", str(model), "--data", data, "--out", str(run), "--set", "tokens=256",
            "--set", "sequence_length=32", "--set", "batch_tokens=64", "--set", "calibrate=none",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (run / "model" / "model.safetensors").is_file()


def test_dropped_samples_and_unfinished_texts_are_not_read(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    shutil.copytree(whole, out)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    lines[1]["dropped"] = "loop"
    (out / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    expected = [line["text"] for line in lines if not line["dropped"]]
    for source in (out, out / "samples.jsonl"):
        assert [_text(record) for record in records(str(source), Reading())] == expected
    (out / "samples.jsonl").write_text('{"kind": "document"}\n')
    (record,) = records(str(out), Reading())
    assert isinstance(record, BadRecord)
    assert "line 1 is not a sample" in str(record)
    record_of = json.loads((out / "synthesis.json").read_text())
    (out / "synthesis.json").write_text(json.dumps(record_of | {"finished": False}))
    with pytest.raises(
        SupraError, match="an unfinished synthesis: run supra data synthesize again"
    ):
        next(records(str(out), Reading()))


def _text(record: Record) -> str:
    assert isinstance(record, Document)
    assert record.is_closed
    return "".join(record.pieces)


def test_an_interrupted_run_goes_on_to_the_same_text(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    lines = (whole / "samples.jsonl").read_bytes()
    for name, share in (("early", 0.01), ("amid", 0.5), ("late", 0.99)):
        out = tmp_path / name
        out.mkdir()
        record = json.loads((whole / "synthesis.json").read_text())
        (out / "synthesis.json").write_text(json.dumps(record | {"finished": False}))
        (out / "samples.jsonl").write_bytes(lines[: int(share * len(lines))])
        synthesize(model, out)
        assert contents(out) == contents(whole)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_a_signal_leaves_what_can_be_gone_on_with(
    sent: str, code: int, model: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "text"
    # The work of hours, so that the signal finds it at work.
    command = ["data", "synthesize", str(model), str(out), *SETTINGS, "--tokens", "100000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "supra_cli", *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    samples, deadline = out / "samples.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if samples.is_file() and samples.stat().st_size > 0:
            break
        time.sleep(0.02)
    process.send_signal(getattr(signal, sent))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    begun = samples.read_bytes()
    # The first batches do not depend on how many are asked for: they are the other run's.
    common = min(
        begun.rfind(b"\n") + 1, (whole / "samples.jsonl").read_bytes().rfind(b'"batch": 3')
    )
    assert common > 0
    record = json.loads((out / "synthesis.json").read_text())
    record["settings"]["tokens"] = 1200
    (out / "synthesis.json").write_text(json.dumps(record))
    kept = [line for line in begun.splitlines(keepends=True) if json.loads(line)["batch"] < 3]
    samples.write_bytes(b"".join(kept))
    synthesize(model, out)
    assert contents(out) == contents(whole)


def test_a_finished_text_is_left_as_it_is(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    shutil.copytree(whole, out)
    record = (out / "synthesis.json").read_bytes()
    (out / "documents.txt").unlink()
    assert synthesize(model, out) == json.loads(record)
    assert (out / "synthesis.json").read_bytes() == record
    assert contents(out) == contents(whole)


def test_other_settings_need_force(model: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    shutil.copytree(whole, out)
    for option, value, field in (
        ("--seed", "1", "seed 0, not 1"),
        ("--top-p", "0.5", "top_p 0.95, not 0.5"),
        ("--tokens", "5000", "tokens 1200, not 5000"),
        ("--turns", "1", "turns 3, not 1"),
    ):
        message = refused(model, out, *SETTINGS, option, value)
        assert field in message and "--force" in message
    other = write_model(tmp_path / "other", CHATML.replace("be brief", "be kind"))
    assert "has model" in refused(other, out, *SETTINGS)
    assert contents(out) == contents(whole)
    synthesize(model, out, "--seed", "1", "--force")
    assert contents(out) != contents(whole)
    # Another place for the same model is the same model.
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    synthesize(moved, out, "--seed", "1")


def test_a_model_without_a_template_writes_documents(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "plain", None, bos=3, eos=4)
    out = tmp_path / "text"
    message = refused(plain, out, "--conversations", "0.5")
    assert "no chat template" in message and "--conversations" in message
    assert not out.exists()
    done = runner.invoke(
        app, ["data", "synthesize", str(plain), str(out), "--tokens", "200", "--length", "60"]
    )
    assert done.exit_code == 0, done.output
    assert "dropped: supra uptrain" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "documents.txt", "samples.jsonl", "synthesis.json",
    ]  # fmt: skip
    assert (out / "documents.txt").read_text().startswith("<s>")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tokens", "0"),
        ("--conversations", "1.5"),
        ("--conversations", "nan"),
        ("--length", "1"),
        ("--length", "4096"),
        ("--length", "26"),
        ("--batch", "0"),
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--top-p", "0"),
        ("--seed", "-1"),
        ("--turns", "0"),
        ("--dtype", "float8"),
    ],
)
def test_settings_that_make_no_sense(option: str, value: str, model: Path, tmp_path: Path) -> None:
    assert option.removeprefix("--") in refused(model, tmp_path / "out", option, value)
    assert not (tmp_path / "out").exists()


def test_models_and_places_that_are_none(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "does not exist" in refused(tmp_path / "absent", out)
    broken = write_model(tmp_path / "broken", "{% for %}")
    assert "chat template cannot be rendered" in refused(broken, out)
    mute = tmp_path / "mute"
    shutil.copytree(model, mute)
    (mute / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(mute, out)
    assert not out.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text.txt").write_text("mine")
    assert "another folder" in refused(model, tmp_path / "mine", "--force")
    (tmp_path / "file").touch()
    assert "is a file" in refused(model, tmp_path / "file")


def test_a_conversion_speaks_as_the_transformer_inside_it(
    model: Path, whole: Path, tmp_path: Path
) -> None:
    converted, out = tmp_path / "converted", tmp_path / "out"
    made = runner.invoke(app, ["convert", str(model), str(converted)])
    assert made.exit_code == 0, made.output
    synthesize(converted, out)
    assert contents(out) == contents(whole)
    folded = tmp_path / "folded"
    made = runner.invoke(app, ["convert", str(model), str(folded), "--fold"])
    assert made.exit_code == 0, made.output
    assert "no longer holds" in refused(folded, tmp_path / "other")


def test_a_model_that_says_nothing_worth_keeping_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last token of the vocabulary for ever: every text is a loop, whatever the machine rounds.
    monkeypatch.setattr(
        "supra_torch.inference.synthesize.draw_tokens",
        lambda logits, *_: torch.full((len(logits),), logits.isfinite().nonzero()[-1, 1].item()),
    )
    model = write_model(tmp_path / "model", None)
    message = refused(model, tmp_path / "out", "--length", "200", "--batch", "4")
    assert "no usable sample" in message and "--temperature" in message
