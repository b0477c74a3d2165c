"""supra bench context on tiny models: what it measures, what it leaves as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")

from supra_cli.main import app  # noqa: E402
from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_mlx.benchmark import benchmark, table  # noqa: E402


@pytest.fixture(scope="module")
def linear(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linear") / "model"
    convert(ConversionRequest(tiny_transformer, out))
    return out


def test_rows(linear: Path, tiny_transformer: Path) -> None:
    result = benchmark(
        str(linear), str(tiny_transformer), contexts=(0, 7, 150, 300), read_up_to=150, steps=5,
        log=lambda line: None,
    )  # fmt: skip
    rows = result["rows"]
    assert [row["context"] for row in rows] == [0, 7, 150, 300]
    assert [row["stock_read"] is None for row in rows] == [False, False, False, True]
    assert rows[1]["read"] < rows[2]["read"] < rows[3]["read"]
    # Two layers, two key/value heads of 8 channels, a key and a value, in float32.
    assert [row["stock_cache_bytes"] for row in rows] == [
        context * 2 * 2 * 8 * 2 * 4 for context in (0, 7, 150, 300)
    ]
    assert rows[0]["cache_bytes"] == 0
    assert rows[1]["cache_bytes"] == rows[2]["cache_bytes"] == rows[3]["cache_bytes"] > 0
    for name in ("step", "stock_step", "step_in_turns"):
        assert all(row[name] > 0 for row in rows)
    shown = table(result).rows
    assert shown[0][7] == "1.000 x"
    assert shown[0][1:4] == ("-", "-", "-")
    assert shown[3][2:4] == ("-", "-")


def test_contexts_have_to_grow(linear: Path, tiny_transformer: Path) -> None:
    with pytest.raises(SupraError, match="do not grow"):
        benchmark(str(linear), str(tiny_transformer), contexts=(5, 0))


def test_the_command(linear: Path, tiny_transformer: Path, tmp_path: Path) -> None:
    arguments = ["bench", "context", str(linear), "--against", str(tiny_transformer), "--context",
                 "9", "--steps", "2", "--out", str(tmp_path)]  # fmt: skip
    assert CliRunner().invoke(app, arguments).exit_code == 0
    (written,) = tmp_path.glob("context-*.json")
    assert json.loads(written.read_text())["rows"][0]["context"] == 9
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    refused = CliRunner().invoke(
        app, ["bench", "context", str(linear), "--against", str(linear), "--context", "9"]
    )
    assert refused.exit_code == 2
    assert "stock mlx-lm" in refused.output
