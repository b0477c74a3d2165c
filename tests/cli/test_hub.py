"""Models from and to the hub as a user runs it: settings by environment, one process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import fake_hub
from tests.fake_hub import TOKEN, Hub

pytest.importorskip("huggingface_hub")


@pytest.fixture
def running(tiny_transformer: Path) -> Iterator[Hub]:
    with fake_hub.serving() as hub:
        files = {file.name: file.read_bytes() for file in tiny_transformer.iterdir()}
        hub.add("org/model", files)
        yield hub


@pytest.fixture
def environment(running: Hub, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept, "HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip


def _supra(environment: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", *map(str, arguments)], capture_output=True, text=True,
        env=environment, check=False, timeout=100,
    )  # fmt: skip
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
    return done


def test_there_and_back(running: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    first, out = running.repositories["org/model"].refs["main"], tmp_path / "out"
    convert = ("convert", "org/model", out, "--no-calibrate", "--push-to", "me/linear", "--json")
    # Nothing is done that could not be pushed.
    refused = _supra(environment, *convert)
    assert refused.returncode == 2 and not out.exists() and not running.fetched()
    assert refused.stderr.startswith("supra: error: uploading to me/linear needs a token: log in")
    environment["HF_TOKEN"] = TOKEN
    done = _supra(environment, *convert, "--private", "--revision", first)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stated_source"] == f"org/model@{first}"
    pushed = running.repositories["me/linear"]
    assert pushed.private and found["pushed"]["commit"] == pushed.refs["main"]
    (files,) = pushed.commits.values()
    assert files == {file.name: file.read_bytes() for file in out.iterdir()}
    # Lines, not bars, where nobody watches.
    lines = done.stderr.splitlines()
    assert any(line.startswith("download  100 %") and "KiB of" in line for line in lines)
    assert "\r" not in done.stderr
    assert any(line.startswith(f"push  {len(files)} files, ") for line in lines)
    # What was pushed is a model for everyone who may see it.
    shown = _supra(environment, "inspect", "me/linear", "--json")
    assert shown.returncode == 0, shown.stderr


def test_offline(running: Hub, environment: dict[str, str], tmp_path: Path) -> None:
    convert = ("convert", "org/model", tmp_path / "out", "--no-calibrate", "--offline")
    done = _supra(environment, *convert)
    assert done.returncode == 2 and not running.asked
    assert done.stderr == (
        "supra: error: org/model is not a folder and not in the cache, and supra is "
        "offline: omit --offline and unset HF_HUB_OFFLINE once, or name a folder\n"
    )
    assert _supra(environment, "inspect", "org/model").returncode == 0
    running.asked.clear()
    assert _supra(environment, *convert).returncode == 0
    environment["HF_HUB_OFFLINE"] = "1"
    assert _supra(environment, *convert, "--force").returncode == 0
    assert not running.asked
    both = _supra(environment, *convert, "--force", "--push-to", "me/linear")
    assert both.returncode == 2 and "--offline contradicts --push-to" in both.stderr


def test_a_push_that_fails_leaves_the_folder(
    running: Hub, environment: dict[str, str], tiny_transformer: Path, tmp_path: Path
) -> None:
    environment["HF_TOKEN"] = TOKEN
    out = tmp_path / "out"
    running.refuses_commits = True
    done = _supra(
        environment, "convert", tiny_transformer, out, "--no-calibrate", "--push-to", "me/linear"
    )
    assert done.returncode == 2
    assert f"{out} is complete: run supra push {out} me/linear" in done.stderr
    assert running.repositories["me/linear"].commits == {}
    running.refuses_commits = False
    pushed = _supra(environment, "push", out, "me/linear", "--json")
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["files"] == len(list(out.iterdir()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--push-to", "linear"), "'linear' is not a hub id: write org/name"),
        (("--push-to", "org/model"), "org/model is the source itself"),
        (("--private",), "--private needs --push-to"),
        (("--revision", "v9"), "org/model has no revision v9"),
        (("--revision", "a b"), "'a b' is not a revision"),
    ],
)
def test_bad_input(
    environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = _supra(environment, "convert", "org/model", tmp_path / "out", *arguments)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
