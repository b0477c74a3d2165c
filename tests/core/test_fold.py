"""Folding is exact, removes the maps, and says when it cannot be done."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from supra_core.conversion.fold import can_fold, fold
from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.errors import SpecError
from supra_core.model.layout import parameter_count, tensor_shapes
from supra_core.model.reference import ReferenceModel
from tests.tiny_models import SPECS, lazy_weights

FOLDABLE = ["paper", "paper_shared", "paper_variant", "between", "windowed_between", "hybrid"]


def _float64(tensors: Any) -> Any:
    return {name: tensor.astype(np.dtype(np.float64)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_changes_nothing(name: str) -> None:
    spec = SPECS[name]
    tensors = _float64(lazy_weights(spec))
    folded, fewer = fold(spec, tensors)
    ids = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 40))
    expected = ReferenceModel(spec, tensors).logits(ids)
    found = ReferenceModel(folded, fewer).logits(ids)
    # Products of float64 matrices, magnified by a GroupNorm of a small output.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    assert list(fewer) == list(tensor_shapes(folded))
    assert parameter_count(folded) < parameter_count(spec)


@pytest.mark.parametrize("preset", ["paper", "pure", "windowed"])
def test_a_folded_model_has_the_transformers_size(preset: Any) -> None:
    transformer = replace(SPECS["transformer"], attention_bias="none")
    spec, tensors = linearize(
        transformer, lazy_weights(transformer), LinearizeOptions(preset=preset)
    )
    folded, fewer = fold(spec, tensors)
    matrices = sum(len(tensor.shape) == 2 for tensor in fewer.values())
    assert matrices == sum(len(shape) == 2 for shape in tensor_shapes(transformer).values())
    # Only vectors remain: biases of q and k, and what windowed learns for each query head.
    vectors = 2 * (80 + {"paper": 0, "pure": 18, "windowed": 24}[preset])
    assert parameter_count(folded) - parameter_count(transformer) == vectors


def test_stored_types_are_kept() -> None:
    spec = SPECS["paper"]
    half = {n: t.astype(np.dtype(np.float16)) for n, t in lazy_weights(spec).items()}
    _, fewer = fold(spec, half)
    assert {tensor.read().dtype for tensor in fewer.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", ["plain", "transformer", "folded"])
def test_what_cannot_be_folded_says_so(name: str) -> None:
    assert not can_fold(SPECS[name])
    with pytest.raises(SpecError, match="nothing can be folded"):
        fold(SPECS[name], lazy_weights(SPECS[name]))
