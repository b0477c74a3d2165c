"""The demo on a tiny model: all stages once, and nothing twice."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supra_cli.main import app
from supra_cli.shared import pythondocs

runner = CliRunner()


def test_the_demo_ends_and_is_reused(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    pytest.importorskip("mlx")
    data, out = tmp_path / "text.txt", tmp_path / "demo"
    data.write_text("\n".join([text_file.read_text()] * 4))
    arguments = [
        "demo", "--model", str(tiny_transformer), "--data", str(data), "--out", str(out),
        "--tokens", "1024",
    ]  # fmt: skip
    first = runner.invoke(app, [*arguments, "--json"])
    assert first.exit_code == 0, first.output
    results = json.loads(first.stdout)
    assert results["verify"]["passed"]
    assert results["memory"][0]["context"] < results["memory"][-1]["context"]
    made = (out / "run" / "model" / "config.json").stat().st_mtime_ns
    second = runner.invoke(app, arguments)
    assert second.exit_code == 0, second.output
    assert "Next: supra chat" in second.stdout
    assert second.stderr.count("done before") == 10
    assert (out / "run" / "model" / "config.json").stat().st_mtime_ns == made
    other = runner.invoke(app, ["demo", "--out", str(out)])
    assert other.exit_code == 2


def test_a_text_that_is_too_short_is_refused_before_any_work(
    tiny_transformer: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "text.txt", tmp_path / "demo"
    data.write_text("One line alone. " * 40)
    arguments = ["demo", "--model", str(tiny_transformer), "--data", str(data), "--out", str(out)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert "name a longer text" in done.stderr
    assert not (out / "converted").exists()
    # Another text, or another length, is another demo.
    data.write_text("One line. " * 50)
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert "other inputs" in done.stderr


def test_python_documents_are_prose_in_a_fixed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = pythondocs._modules
    monkeypatch.setattr(pythondocs, "_modules", lambda: islice(modules(), 100))
    texts = pythondocs.documents()
    assert ">>>" not in "".join(texts)
    assert pythondocs.documents() == texts


@pytest.mark.slow
def test_python_documents_are_plentiful() -> None:
    train, held_out = pythondocs.split(pythondocs.documents(), 40_000)
    assert len(train) > 1_200_000
    assert 40_000 <= len(held_out) < 200_000
