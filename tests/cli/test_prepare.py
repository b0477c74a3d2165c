"""``supra data prepare`` as a user runs it, and a run on what it made."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

pytest.importorskip("torch")

from supra_cli.main import app  # noqa: E402
from supra_core.data.store import TokenStore  # noqa: E402
from tests.tiny_chat import write_model  # noqa: E402

runner = CliRunner()
TEXT = "A state has one size. The text may be as long as it likes.\n" * 120
# The tokenizer has no line's end, and a document ends with a token of its own.
TOKENS = len(TEXT.replace("\n", "")) + 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def supra(*arguments: str | Path, code: int = 0) -> Any:
    done = runner.invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    if code:
        errors = [line for line in done.stderr.splitlines() if line.startswith("supra: error: ")]
        assert len(errors) == 1
        return errors[0]
    return json.loads(done.stdout)


def uptrained(model: Path, data: Path | str, out: Path) -> Path:
    settings = {
        "tokens": 128, "sequence_length": 32, "batch_tokens": 64, "calibrate": "none",
        "linearize.window": 8,
    }  # fmt: skip
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    supra("uptrain", model, "--data", data, "--out", out, *sets)
    return out


def test_a_prepared_text_trains_as_the_text_does(model: Path, text: Path, tmp_path: Path) -> None:
    made = supra("data", "prepare", text, "--tokenizer", model, "--out", tmp_path / "tokens")
    assert made["documents"] == 1
    assert made["tokens"] == TOKENS
    runs = [
        uptrained(model, data, tmp_path / f"run {i}")
        for i, data in enumerate((text, tmp_path / "tokens"))
    ]
    one, other = (load_file(run / "model" / "model.safetensors") for run in runs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name])
    # It is read where it is.
    assert not (runs[1] / "data" / "tokens").exists()


def test_records_train_without_being_prepared(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl.gz"
    talk = [{"role": "user", "content": TEXT[:80]}, {"role": "assistant", "content": TEXT[:200]}]
    file.write_bytes(gzip.compress((json.dumps({"messages": talk}) + "\n").encode() * 40))
    run = uptrained(model, file, tmp_path / "run")
    assert TokenStore(run / "data" / "tokens").index["documents"] == 40


def test_tokens_of_another_model_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    supra("data", "prepare", text, "--tokenizer", model, "--out", out)
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "tokenizer": "0" * 64}))
    said = supra("uptrain", model, "--data", out, "--out", tmp_path / "run", code=2)
    assert "was prepared with another tokenizer" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--field", "body"), "line 1 has no field body, but text: name one with --field"),
        (("--shard-tokens", "0"), "at least one token"),
    ],
)
def test_bad_settings(model: Path, tmp_path: Path, more: tuple[str, ...], said: str) -> None:
    file, out = tmp_path / "d.jsonl", tmp_path / "out"
    file.write_text('{"text": "a"}\n')
    assert said in supra("data", "prepare", file, "--tokenizer", model, "--out", out, *more, code=2)
    assert not out.exists()


def test_left_out_records_are_told(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a"}\n' + "no\n" * 12)
    arguments = ("data", "prepare", file, "--tokenizer", model, "--out")
    said = supra(*arguments, tmp_path / "out", code=2)
    assert "line 2 is not JSON" in said
    assert "skip such records with --skip-bad" in said
    done = runner.invoke(app, [*map(str, arguments), str(tmp_path / "out"), "--skip-bad"])
    assert done.exit_code == 0
    assert done.stderr.count("skipped: ") == 11
    assert "skipped: 2 more" in done.stderr


BAD_RECORDS = {
    "a.jsonl": '{"text": "a"}\n{"text": "cut \\ud83d"}\n',
    "b.json": '[{"text": "a"},\n{"messages": [{"role": 1, "content": "a"}]}]',
    "c.csv": "text,id\na,1\nb\n",
    "d.jsonl": '{"text": "a"}\n{"text": null}\n',
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_never_ends_in_a_traceback(name: str, model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / name, tmp_path / "out"
    file.write_text(BAD_RECORDS[name])
    arguments = ("data", "prepare", file, "--tokenizer", model, "--out", out)
    line = 3 if name == "c.csv" else 2
    assert f"{name} line {line}" in supra(*arguments, code=2)
    assert not out.exists()
    made = supra(*arguments, "--skip-bad")
    assert (made["documents"], made["skipped"]) == (1, 1)


def test_what_is_not_read_is_told(model: Path, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("a.xml", "b.jpg", "c.jpg", "d.txt"):
        (given / name).write_text(TEXT)
    arguments = ("data", "prepare", given, "--tokenizer", model, "--out", tmp_path / "out")
    done = runner.invoke(app, [*map(str, arguments)])
    assert "not read: 2 .jpg, 1 .xml\n" in done.stderr
    settings = ("tokens=128", "sequence_length=32", "batch_tokens=64", "calibrate=none")
    chosen = [part for setting in settings for part in ("--set", setting)]
    arguments = ("uptrain", model, "--data", given, "--out", tmp_path / "run", *chosen)
    done = runner.invoke(app, [*map(str, arguments)])
    assert f"not read in {given}: 2 .jpg, 1 .xml\n" in done.stderr
    said = supra("data", "prepare", given / "b.jpg", "--tokenizer", model, "--out", "x", code=2)
    assert "b.jpg ends in .jpg, which is not read as text" in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_and_again(model: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "d.jsonl", tmp_path / "out"
    file.write_text((json.dumps({"text": TEXT}) + "\n") * 1000)
    command = [
        sys.executable, "-m", "supra_cli", "data", "prepare", str(file), "--tokenizer", str(model),
        "--out", str(out), "--shard-tokens", "50000",
    ]  # fmt: skip
    position = tmp_path / ".out.preparing" / "position.json"
    with subprocess.Popen(command, env=os.environ, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not position.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not out.exists()
    before = len(json.loads(position.read_text())["shards"])
    assert before
    made = supra(
        "data", "prepare", file, "--tokenizer", model, "--out", out, "--shard-tokens", "50000"
    )
    assert made["tokens"] == 1000 * TOKENS
    assert len(made["shards"]) >= before
