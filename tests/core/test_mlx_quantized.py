"""Packed matrices, without MLX: the bits of a stream, and configs that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.errors import FormatError
from supra_core.formats.mlx_quantized import (
    Packing,
    packing_config,
    read_packed,
    unpack,
    unpacked,
)
from supra_core.tensors import LazyTensor

BITS = (2, 3, 4, 5, 6, 8)


def pack(numbers: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """One number after the other, lowest bit first, by Python's integers."""
    rows = []
    for row in numbers.tolist():
        stream = sum(number << (bits * place) for place, number in enumerate(row))
        size = len(row) * bits // 8
        rows.append(np.frombuffer(stream.to_bytes(size, "little"), dtype="<u4"))
    return np.stack(rows)


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_a_stream_of_bits(bits: int, rows: int, words: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (rows, 32 * words))
    np.testing.assert_array_equal(unpack(pack(numbers, bits), bits), numbers)


def tensors(bits: int = 4, group: int = 32) -> dict[str, LazyTensor]:
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**bits, (3, 64))
    return {
        "a.weight": LazyTensor.of(pack(numbers, bits)),
        "a.scales": LazyTensor.of(rng.normal(size=(3, 64 // group)).astype(np.float32)),
        "a.biases": LazyTensor.of(rng.normal(size=(3, 64 // group)).astype(np.float32)),
        "b.weight": LazyTensor.of(rng.normal(size=(2, 2)).astype(np.float32)),
    }


@pytest.mark.parametrize("bits", BITS)
def test_a_matrix_is_scale_times_number_plus_bias(bits: int) -> None:
    stored = tensors(bits)
    full = unpacked(read_packed(stored, {"bits": bits, "group_size": 32}, "x"))
    assert full.keys() == {"a.weight", "b.weight"}
    numbers = unpack(stored["a.weight"].read(), bits).reshape(3, 2, 32)
    scales, biases = (stored[f"a.{part}"].read()[..., None] for part in ("scales", "biases"))
    expected = (numbers * scales + biases).reshape(3, 64)
    np.testing.assert_array_equal(full["a.weight"].read(), expected.astype(np.float32))


def test_modules_may_differ() -> None:
    config = {"bits": 8, "group_size": 64, "a": {"bits": 4, "group_size": 32}}
    packed = read_packed(tensors(), config, "x")
    assert packed.modules == {"a": Packing(4, 32)}
    modules = {"a": Packing(4, 64), "b": Packing(4, 64), "c": Packing(8, 64)}
    written = packing_config(modules)
    assert (written["bits"], written["c"]["bits"], "a" in written) == (4, 8, False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "field quantization must be an object"),
        ({"bits": 7, "group_size": 32}, "7 bits in groups of 32: known are 2, 3, 4, 5, 6, 8"),
        ({"bits": 4, "group_size": 64}, r"a has weight \(3, 8\), scales \(3, 2\)"),
        ({"bits": 4}, "4 bits in groups of None"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mode is mxfp4: only affine"),
    ],
)
def test_what_does_not_fit_is_named(config: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_packed(tensors(), config, "x")


@pytest.mark.parametrize("part", ["weight", "biases"])
def test_a_part_that_is_missing(part: str) -> None:
    stored = tensors()
    del stored[f"a.{part}"]
    with pytest.raises(FormatError, match=f"{part} None|biases None"):
        read_packed(stored, {"bits": 4, "group_size": 32}, "x")
