"""Mixtures of experts in MLX, and what mlx-lm's own converter makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.utils import load_model, quantize_model, save  # noqa: E402

from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.errors import LayoutError  # noqa: E402
from supra_core.formats.mlx_experts import unstacked  # noqa: E402
from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_core.model.spec import Experts, ModelSpec  # noqa: E402
from supra_core.runtime.backend import load  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_mlx.backend import MLXBackend  # noqa: E402
from supra_mlx.weights import build_model, load_source  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402
from tests.tiny_families import write  # noqa: E402
from tests.tiny_models import lazy_weights, with_experts  # noqa: E402


class _Tokenizer:
    """What mlx-lm saves beside a model: nothing, here."""

    def save_pretrained(self, path: Path) -> None:
        """No file."""


def _ids(spec: ModelSpec, B: int = 2, T: int = 21) -> Any:
    return np.random.default_rng(0).integers(0, spec.vocab_size, (B, T))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("per_token", [1, 3, 5])
def test_any_number_of_experts(per_token: int, normalise: bool) -> None:
    """In few tokens, and in as many as are sorted by their experts before they are multiplied."""
    spec = with_experts(SPECS["paper"], Experts(5, per_token, 8, normalise))
    ids = _ids(spec, 2, 40)
    expected = ReferenceModel(spec, lazy_weights(spec)).logits(ids)
    found = MLXBackend(build_model(spec, lazy_weights(spec), "m"))
    for form in ("parallel", "step"):
        np.testing.assert_allclose(
            found.logits(ids, form=form),  # type: ignore[arg-type]
            expected,
            rtol=0,
            atol=1e-4 * expected.std(),
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_experts_of_16_bits(tmp_path: Path, dtype: str) -> None:
    """As they are released; on a CPU MLX gathers products in float32 alone."""
    spec = with_experts(SPECS["windowed"], Experts(5, 2, 8))
    convert(
        ConversionRequest(
            write_chat_model(tmp_path / "model", spec), tmp_path / "half", dtype=dtype
        )
    )
    source = open_source(tmp_path / "half")
    ids = _ids(source.spec)
    expected = ReferenceModel(source.spec, source.tensors).logits(ids)
    theirs, _ = load_model(tmp_path / "half", trust_remote_code=True)
    ours = load_source(source)
    for model in (ours, theirs):
        found = np.array(model(mx.array(ids)).astype(mx.float32))
        # A router of 8 bits' precision may take another of two alike experts.
        assert np.median(np.abs(found - expected)) < 0.05 * expected.std()


@pytest.mark.parametrize("bits", [None, 8])
def test_an_artifact_that_mlx_lm_converted(tmp_path: Path, bits: int | None) -> None:
    """It stacks a layer's experts, and quantises all matrices but routers; we read both."""
    spec = with_experts(replace(SPECS["windowed"], hidden_size=64), Experts(5, 2, 64), dense=(1,))
    folder = write_chat_model(tmp_path / "model", spec)
    theirs, config = load_model(folder, trust_remote_code=True)
    if bits is not None:
        theirs, config = quantize_model(theirs, config, 32, bits)
    ids = _ids(spec)
    expected = np.array(theirs(mx.array(ids)))
    save(tmp_path / "saved", folder, theirs, _Tokenizer(), config)
    source = open_source(tmp_path / "saved")
    assert (source.spec.layers, source.spec.experts) == (spec.layers, spec.experts)
    assert (source.packed is None) == (bits is None)
    np.testing.assert_array_equal(np.array(load_source(source)(mx.array(ids))), expected)
    again, _ = load_model(tmp_path / "saved", trust_remote_code=True)
    np.testing.assert_array_equal(np.array(again(mx.array(ids))), expected)
    if bits is None:
        before = open_source(folder).tensors
        assert before.keys() == source.tensors.keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(source.tensors[name].read(), tensor.read())
    else:
        found = load("reference", tmp_path / "saved").logits(ids)
        np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("name", ["mixtral-sliding", "qwen3_moe"])
def test_a_transformer_that_mlx_lm_converted(name: str, tmp_path: Path) -> None:
    """Its stacked experts are those of our folder, tensor for tensor, and mean the same to it."""
    pytest.importorskip("transformers")
    write(name, tmp_path / "theirs")
    # mlx-lm asks for the fields of released configs, which transformers 5 no longer writes.
    convert(ConversionRequest(tmp_path / "theirs", tmp_path / "hf", to="hf"))
    theirs, config = load_model(tmp_path / "hf")
    # Inside the window, which mlx-lm's model leaves out.
    ids = _ids(open_source(tmp_path / "hf").spec, 2, 7)
    expected = load("reference", tmp_path / "theirs").logits(ids)
    np.testing.assert_allclose(theirs(mx.array(ids)), expected, rtol=0, atol=1e-4 * expected.std())
    save(tmp_path / "mlx", tmp_path / "hf", theirs, _Tokenizer(), config)
    stored = (tmp_path / "mlx" / "model.safetensors.index.json").read_text()
    assert "switch_mlp" in stored and ".experts." not in stored
    before, after = (open_source(tmp_path / place) for place in ("hf", "mlx"))
    assert replace(after.spec, provenance=before.spec.provenance) == before.spec
    assert after.tensors.keys() == before.tensors.keys()
    for key, tensor in before.tensors.items():
        np.testing.assert_array_equal(after.tensors[key].read(), tensor.read())


def test_stacks_of_another_shape_are_listed() -> None:
    spec = with_experts(SPECS["paper"], Experts(5, 2, 16))
    name = "model.layers.0.mlp.switch_mlp.up_proj.weight"
    for shape in ((4, 16, 24), (), (16, 24)):
        wrong = {name: LazyTensor.of(np.zeros(shape, np.float32))}
        assert unstacked(spec, wrong) == wrong
    right = unstacked(spec, {name: LazyTensor.of(np.ones((5, 16, 24), np.float32))})
    assert {tensor.shape for tensor in right.values()} == {(16, 24)} and len(right) == 5


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_missing_expert_is_named(change: str) -> None:
    spec = with_experts(SPECS["paper"], Experts(5, 2, 16))
    tensors = lazy_weights(spec)
    moved = tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight")
    if change == "unexpected":
        tensors["model.layers.1.mlp.experts.5.up_proj.weight"] = moved
    with pytest.raises(LayoutError, match=rf"{change} model\.layers\.1\.mlp\.experts\.[35]\.up"):
        build_model(spec, tensors, "m")


def test_stock_mlx_lm_misses_no_expert(tmp_path: Path) -> None:
    """Where nothing of ours checks names before, either."""
    spec = with_experts(SPECS["paper"], Experts(5, 2, 16))
    folder = write_chat_model(tmp_path / "model", spec)
    place = folder / "model.safetensors"
    weights = mx.load(str(place))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    weights[name.replace(".3.", ".7.")] = weights.pop(name)
    mx.save_safetensors(str(place), weights, {"format": "mlx"})
    with pytest.raises(ValueError, match="parameters not in model"):
        load_model(folder, trust_remote_code=True)
