"""Safetensors: every type round-trips; damaged and hostile files are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from supra_core.errors import FormatError
from supra_core.formats import safetensors
from supra_core.tensors import LazyTensor


def _lazy(arrays: dict[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(array) for name, array in arrays.items()}


def test_types_and_shapes_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "odd_bf16": rng.normal(size=3).astype(ml_dtypes.bfloat16),
        "f32": rng.normal(size=(4, 5)).astype(np.float32),
        "f16": rng.normal(size=(2, 3, 1)).astype(np.float16),
        "ids": np.arange(6, dtype=np.int64),
        "scalar": np.array(2.5, np.float64),
        "empty": np.empty((0, 7), np.float32),
        "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    }
    path = tmp_path / "model.safetensors"
    safetensors.write_file(path, _lazy(arrays), {"note": "hello"})
    found = safetensors.read_file(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        read = found[name].read()
        assert read.dtype == array.dtype
        assert read.flags.aligned
        np.testing.assert_array_equal(read, array)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_the_library_reads_what_is_written_and_the_other_way(tmp_path: Path) -> None:
    arrays = {"b": np.ones((2, 2), np.float32), "a": np.zeros(3, np.float16)}
    safetensors.write_file(tmp_path / "ours", _lazy(arrays))
    save_file(arrays, tmp_path / "theirs")
    for found in (
        load_file(tmp_path / "ours"),
        {name: t.read() for name, t in safetensors.read_file(tmp_path / "theirs").items()},
    ):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


def test_shards_with_an_index(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full(256, i, np.float32) for i in range(5)}
    steps: list[tuple[int, int]] = []
    safetensors.write_folder(
        tmp_path, _lazy(arrays), progress=lambda *step: steps.append(step), shard_bytes=2048
    )
    assert len(list(tmp_path.glob("model-*-of-00003.safetensors"))) == 3
    assert steps == [(1024 * (i + 1), 5120) for i in range(5)]
    index = json.loads((tmp_path / safetensors.INDEX).read_text())
    assert index["metadata"]["total_size"] == 5120
    for name, tensor in safetensors.read_folder(tmp_path).items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.ones((8, 8), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FormatError, match=r"cut\.safetensors: truncated or damaged"):
        safetensors.read_file(path)


def test_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": np.ones((512, 512), np.float32)}, path)
    tensor = safetensors.read_file(path)["a"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="changed while it was open"):
        tensor.read()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ""])
def test_index_may_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": {"t": name}}))
    with pytest.raises(FormatError, match="outside its folder"):
        safetensors.read_folder(tmp_path)


def test_missing_shard_and_missing_tensor(tmp_path: Path) -> None:
    index = tmp_path / safetensors.INDEX
    index.write_text(json.dumps({"weight_map": {"t": "one.safetensors"}}))
    with pytest.raises(FormatError, match=r"one\.safetensors is missing"):
        safetensors.read_folder(tmp_path)
    save_file({"other": np.ones(1, np.float32)}, tmp_path / "one.safetensors")
    with pytest.raises(FormatError, match="lacks t"):
        safetensors.read_folder(tmp_path)
    index.write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        safetensors.read_folder(tmp_path)
