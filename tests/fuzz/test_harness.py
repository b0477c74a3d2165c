"""The harness notices what it is there for; the valid files that the others change are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from supra_core.errors import FormatError
from supra_core.formats.safetensors import INDEX
from supra_core.text import worker
from supra_core.text.worker import Described
from tests.fuzz import corpora, formats, harness, requests, resumed, texts
from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import ROOT, Violation, assert_refused_or_read, check_files

SOME = {"a": b"1"}


def _with(action: object) -> None:
    check_files(SOME, "", action)  # type: ignore[arg-type]


def test_what_is_read_and_what_is_refused() -> None:
    def refuse(path: Path) -> None:
        raise FormatError(f"{path}: no: get it again")

    assert check_files(SOME, "", lambda path: (path / "a").read_bytes())
    assert not check_files(SOME, "a", refuse)


@pytest.mark.parametrize(
    "action",
    [
        lambda path: (path / "b").write_bytes(b""),
        lambda path: (path.parent / "b").touch(),
        lambda path: (path / "a").unlink(),
        lambda path: os.rename(path / "a", path / "b"),
        lambda path: os.mkdir(path / "b"),
        lambda path: os.system("true"),
        lambda path: subprocess.run(["true"], check=True),
        lambda path: Path("/etc/passwd").read_bytes(),
        lambda path: open(os.devnull, "w").close(),
    ],
)
def test_what_is_forbidden(action: object) -> None:
    with pytest.raises(Violation):
        _with(action)


@pytest.mark.parametrize(
    ("path", "seen"), [("/etc/passwd", "open .'/etc/passwd'"), (ROOT / "none", "FileNotFoundError")]
)
def test_what_is_forbidden_in_the_process_of_its_own(path: Path, seen: str) -> None:
    described = Described("tests.fuzz.child:opening", {"path": str(path)}, b"")
    with pytest.raises(Violation, match=seen):
        _with(lambda _: worker.WORKER.ask(described, "encode", [], 1))


def test_other_errors_are_not_taken_for_a_refusal() -> None:
    for error in (ValueError("x"), MemoryError(), RecursionError(), KeyError("x")):

        def fail(path: Path, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error)):
            _with(fail)


# Whether a limit of address space is kept at all: some sandboxes accept it and look away.
_EXCEED = """
import mmap, resource
resource.setrlimit(resource.RLIMIT_AS, (2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
mmap.mmap(-1, 2**31)
"""


def test_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "SECONDS", 0.05)

    def loop(path: Path) -> None:
        while True:
            pass

    with pytest.raises(Violation, match="seconds"):
        _with(loop)
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not say how much memory a process holds")
    if subprocess.run([sys.executable, "-c", _EXCEED]).returncode == 0:
        pytest.skip("this system does not hold a process to its limit of memory")
    monkeypatch.setattr(harness, "SECONDS", 5)
    # Far over the limit: garbage of earlier tests may give memory back between limit and reading.
    with pytest.raises(MemoryError):
        _with(lambda path: np.empty(16 * harness.MEMORY, np.uint8))


def test_valid_files_are_read() -> None:
    plain = formats._artifact("tiny")
    for name in ("tiny", *formats.SPECS):
        assert check_files(formats._artifact(name))
    for name in formats.FAMILIES:
        assert check_files(formats._family(name)), name
    weights, config = plain["model.safetensors"], formats.json.dumps(formats._PLAIN_CONFIG).encode()
    assert check_files({"model.safetensors": weights, "config.json": config})
    assert check_files({"pytorch_model.bin": formats._valid_zip(), "config.json": config})
    index = {"weight_map": dict.fromkeys(formats.tensor_shapes(formats.PLAIN), "a.safetensors")}
    assert check_files(
        {INDEX: formats.json.dumps(index).encode(), "a.safetensors": weights, "config.json": config}
    )
    assert check_files(formats._published())
    assert check_files({"s": formats._state()}, "s", FORMATS["state"].read)
    assert formats._with_sum(formats._state()) is not None
    assert check_files({"s": formats._with_sum(formats._state())}, "s", FORMATS["state"].read)


def test_what_the_others_change_is_read() -> None:
    assert check_files({"chat": json.dumps(requests._CHAT).encode()}, "chat", requests._read)
    for backend in resumed._BACKENDS:
        for name in resumed._SPECS:
            state = resumed._packed(*resumed._saved(backend, name, 9))
            assert check_files({"state": state}, "state", resumed._read)
    for described in texts._described():
        assert check_files(
            {"tokenizer.json": json.dumps(described).encode()}, "", texts._read_tokenizer
        )
    config = json.dumps({"bos_token": "<s>", "eos_token": "</s>"}).encode()
    for template in (texts.CHATML, texts.LLAMA3):
        files = {"chat_template.jinja": template.encode(), "tokenizer_config.json": config}
        check_files(files, "", texts._read_template)
    for record in corpora._RECORDS[:3]:
        content = json.dumps(record).encode()
        assert check_files({"a.jsonl": content}, "a.jsonl", corpora._read)


FOUND = sorted(path for path in (Path(__file__).parent / "found").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", FOUND, ids=lambda folder: folder.name)
def test_inputs_that_failed_once(folder: Path) -> None:
    """What fuzzing has found: each was an error of another kind, and is refused or read now."""
    name = (folder / ".open").read_text()
    assert_refused_or_read(folder / name, FORMATS[folder.name.split("-")[0]].read)


def test_the_runner_counts_and_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", "--inputs", "20", "state"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "20 inputs" in done.stdout
    assert "0 failures" in done.stdout
