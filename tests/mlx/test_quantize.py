"""Quantised folders: MLX's own arithmetic, every other backend unpacked, stock mlx-lm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.utils import load_model  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from supra_core.model.spec import Experts  # noqa: E402
from supra_core.runtime.backend import load  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_mlx.weights import load_source, to_mlx  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402
from tests.tiny_models import with_experts  # noqa: E402

runner = CliRunner()


def convert(source: Path, out: Path, *arguments: str) -> str:
    told = runner.invoke(app, ["convert", str(source), str(out), *arguments])
    assert told.exit_code == 0, told.output
    return told.output


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = replace(SPECS["windowed_sink"], hidden_size=64, intermediate_size=128)
    if request.param == "experts":
        spec = with_experts(spec, Experts(5, 2, 64), dense=(1,))
    return write_chat_model(tmp_path_factory.mktemp("models") / "model", spec)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_every_backend_computes_the_packed_model(folder: Path, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "packed"
    convert(folder, out, "--quantize", str(bits))
    source = open_source(out)
    assert source.packed is not None
    packed_experts = sum(".mlp.experts." in name for name in source.packed.modules)
    assert packed_experts == (0 if source.spec.experts is None else 3 * 5)
    assert not any(name.endswith("mlp.gate") for name in source.packed.modules)
    for name, packing in source.packed.modules.items():
        finer = name.endswith(("v_proj", "embed_tokens", "lm_head"))
        assert packing.bits == (min(bits + 2, 8) if finer else bits)
        parts = [
            to_mlx(source.packed.tensors[f"{name}.{p}"].read())
            for p in ("weight", "scales", "biases")
        ]
        expected = mx.dequantize(*parts, packing.group_size, packing.bits)
        # A product and a sum, rounded once in MLX and twice here.
        np.testing.assert_allclose(
            source.tensors[f"{name}.weight"].read(), np.array(expected), rtol=1e-6, atol=1e-6
        )
    ids = np.random.default_rng(0).integers(0, source.spec.vocab_size, (2, 21))
    expected = load("reference", out).logits(ids)
    packed = load_source(source)(mx.array(ids))
    spread = expected.std()
    np.testing.assert_allclose(np.array(packed), expected, atol=1e-4 * spread)
    stock, _ = load_model(out, trust_remote_code=True)
    np.testing.assert_array_equal(np.array(stock(mx.array(ids))), np.array(packed))
    assert sum(f.stat().st_size for f in out.glob("*.safetensors")) < sum(
        f.stat().st_size for f in folder.glob("*.safetensors")
    )


def test_more_bits_are_nearer(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 40, (1, 30))
    exact, errors = load("reference", folder).logits(ids), []
    for bits in ("4", "6", "8"):
        convert(folder, tmp_path / bits, "--quantize", bits)
        errors.append(np.abs(load("reference", tmp_path / bits).logits(ids) - exact).mean())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--quantize", "5"), "--quantize must be one of 4, 6, 8, not 5"),
        (("--quantize", "4", "--to", "hf"), "--quantize needs --to supra: omit it for --to hf"),
    ],
)
def test_what_cannot_be_quantised(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    told = runner.invoke(app, ["convert", str(folder), str(tmp_path / "out"), *arguments])
    assert told.exit_code == 2
    assert message in told.output
    assert not (tmp_path / "out").exists()


def test_rows_that_no_group_divides(tmp_path: Path) -> None:
    narrow = write_chat_model(tmp_path / "narrow", SPECS["paper"])
    told = runner.invoke(app, ["convert", str(narrow), str(tmp_path / "out"), "--quantize", "4"])
    assert (
        told.exit_code,
        "no matrix of the model has rows of a multiple of 64" in told.output,
    ) == (2, True)
