"""supra bench decode: the static decoder is checked against the eager step before it is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from supra_cli.main import app  # noqa: E402
from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.model.layout import active_parameter_count  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_torch.benchmark import decode  # noqa: E402
from supra_torch.inference.decode import Decoder  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "copy_bandwidth", lambda device: 1e10)


@pytest.fixture(scope="module")
def converted(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = open_source(tiny_transformer), tmp_path_factory.mktemp("converted") / "model"
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(preset="windowed"))
    artifact.write(folder, spec, tensors, source.assets(), dtype="float32")
    return folder


def _rows(model: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = decode.benchmark(
        str(model), batches=[1, 3], steps=2, log=lambda line: None
    )["rows"]
    return rows


def test_both_steps_are_timed(converted: Path) -> None:
    rows = _rows(converted)
    steps = "CUDA graph" if torch.cuda.is_available() else "static"
    assert [(row["batch"], row["step"]) for row in rows] == [
        (1, "eager"), (1, steps), (3, "eager"), (3, steps),
    ]  # fmt: skip
    for row in rows:
        assert row["reason"] is None
        assert row["tokens_per_second"] == pytest.approx(row["batch"] / row["seconds"])
    assert rows[2]["state_bytes"] == 3 * rows[0]["state_bytes"]


def test_the_floor_of_a_mixture_is_one_token_s(tmp_path: Path) -> None:
    spec = SPECS["experts_linear"]
    artifact.write(tmp_path / "m", spec, lazy_weights(spec), {}, dtype="float32")
    found = decode.benchmark(str(tmp_path / "m"), batches=[1], steps=2, log=lambda line: None)
    assert [row["step"] for row in found["rows"]] == ["eager", "static"]
    head = spec.vocab_size * spec.hidden_size
    assert found["weight_bytes"] == 4 * (active_parameter_count(spec) - head)


def test_a_wrong_decoder_is_not_timed(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Decoder.advance
    monkeypatch.setattr(Decoder, "advance", lambda self, ids: 1.001 * right(self, ids))
    static = [row for row in _rows(converted) if row["step"] != "eager"]
    assert static and all(row["failed"] and row["seconds"] is None for row in static)
    assert all("not timed: logits are off by" in row["reason"] for row in static)


def test_a_growing_state_is_a_reason(tiny_transformer: Path) -> None:
    eager, static = _rows(tiny_transformer)[:2]
    assert eager["seconds"] > 0
    assert "grows" in static["reason"] and not static["failed"]


def test_the_command(converted: Path, tmp_path: Path) -> None:
    arguments = ["bench", "decode", str(converted), "--steps", "2", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    (stored,) = tmp_path.glob("decode-*.json")
    assert json.loads(stored.read_text()) == json.loads(result.stdout)
    assert "| 1 | eager |" in stored.with_suffix(".md").read_text()
    assert CliRunner().invoke(app, arguments).exit_code == 2


@pytest.mark.parametrize("option", ["--batch", "--steps"])
def test_a_count_below_one_is_refused(option: str, converted: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", str(converted), option, "0"])
    assert result.exit_code == 2
    assert option in result.output


def test_an_absent_model_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", str(tmp_path / "nothing")])
    assert result.exit_code == 2
