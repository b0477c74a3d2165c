"""Weights that are no numbers are noticed, wherever they stand, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.artifact import folder as artifact
from supra_core.conversion.convert import ConversionRequest, convert
from supra_core.errors import SupraError
from supra_core.formats import finite, safetensors
from supra_core.formats.finite import Watch, is_finite
from supra_core.sources.source import open_source
from supra_core.tensors import BFLOAT16, LazyTensor

TYPES = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_place_and_kind(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finite, "_BLOCK", 7)
    rng = np.random.default_rng(0)
    largest = np.array([np.finfo(np.float16).max], np.float32).astype(dtype)
    for place in range(24):
        array = rng.normal(size=(4, 6)).astype(dtype)
        array.flat[(place + 1) % 24] = -largest[0]
        assert is_finite(array) and is_finite(array.T) and is_finite(array[::2, 1::2])
        for value in (np.nan, -np.nan, np.inf, -np.inf):
            array.flat[place] = value
            assert not is_finite(array) and not is_finite(array.T)
    assert is_finite(np.empty((0, 3), dtype)) and is_finite(np.array(1.0, dtype))


def test_every_pattern_of_sixteen_bits() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    for dtype in (np.dtype(np.float16), BFLOAT16):
        values = patterns.view(dtype)
        with np.errstate(invalid="ignore"):
            expected = np.isfinite(values)
        found = [is_finite(values[i : i + 1]) for i in range(0, 2**16, 37)]
        np.testing.assert_array_equal(found, expected[::37])
    assert is_finite(patterns)


def test_rows_are_watched_too() -> None:
    array = np.array([[1.0], [np.nan]], np.float32)
    watch = Watch()
    lazy = LazyTensor(array.shape, array.dtype, lambda: array, lambda a, b: array[a:b])
    watched = watch.over({"w": lazy, "v": LazyTensor.of(array)})
    watched["w"].rows(0, 1)
    assert watch.found == ()
    watched["w"].rows(1, 2)
    watched["v"].rows(0, 1)
    assert watch.found == ("w", "v")


@pytest.fixture
def damaged(tiny_transformer: Path, tmp_path: Path) -> Path:
    source = open_source(tiny_transformer)
    arrays = {name: tensor.read().copy() for name, tensor in source.tensors.items()}
    arrays["model.layers.1.self_attn.k_proj.weight"][3, 4] = np.nan
    arrays["model.norm.weight"][-1] = -np.inf
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny_transformer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lazy = {name: LazyTensor.of(array) for name, array in arrays.items()}
    safetensors.write_file(folder / safetensors.SINGLE, lazy)
    return folder


@pytest.mark.parametrize("to", ["supra", "hf", "openlm"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_conversion_names_them(damaged: Path, tmp_path: Path, to: str, dtype: str) -> None:
    done = convert(
        ConversionRequest(damaged, tmp_path / "out", to=to, dtype=dtype, linearize=False)
    )
    assert sorted(done.not_finite) == [
        "model.layers.1.self_attn.k_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    # They stand there as they were.
    found = open_source(tmp_path / "out").tensors["model.layers.1.self_attn.k_proj.weight"].read()
    assert np.isnan(found.astype(np.float32)).sum() == 1


def test_a_sound_model_has_none(tiny_transformer: Path, tmp_path: Path) -> None:
    assert convert(ConversionRequest(tiny_transformer, tmp_path / "out")).not_finite == ()
    assert artifact.read(tmp_path / "out").spec.provenance.recipe == "windowed"


def test_nothing_is_calibrated_with_them(damaged: Path, tmp_path: Path) -> None:
    def calibrate(*_: Any) -> Any:
        raise AssertionError("asked before")

    with pytest.raises(SupraError, match=r"damaged: model\.\S+ holds NaN or infinity, with which"):
        convert(ConversionRequest(damaged, tmp_path / "out", calibrate=calibrate))
    assert not (tmp_path / "out").exists()
