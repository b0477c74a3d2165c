"""Softmax over a window with sinks: what it is of the transformer, and how it is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from supra_core.conversion.convert import ConversionRequest, convert
from supra_core.conversion.linearize import LinearizeOptions, linear_spec, linearize
from supra_core.errors import SpecError, SupraError
from supra_core.mixers.window import WindowAttention
from supra_core.model.reference import ReferenceModel
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import open_source
from tests.tiny_models import SPECS, lazy_weights, random_weights

IDS = np.random.default_rng(0).integers(0, 50, (1, 24))


def test_it_is_the_transformer_until_a_token_is_out_of_sight() -> None:
    spec = SPECS["transformer"]
    weights = random_weights(spec)
    seen = spec.with_mixers([WindowAttention(6, 2)] * spec.num_hidden_layers)
    full = ReferenceModel(spec, weights).logits(IDS)
    found = ReferenceModel(seen, weights).logits(IDS)
    # Token 8 is the first that one before it, number 2, is neither a sink of nor in the window.
    np.testing.assert_allclose(found[:, :8], full[:, :8], rtol=1e-12, atol=1e-12)
    assert np.abs(found[:, 8] - full[:, 8]).max() > 1e-3


def test_a_layer_is_softmax_over_what_is_in_sight() -> None:
    """One layer, by hand: the keys of tokens 0, 1 and the last six."""
    spec = replace(SPECS["transformer"], layers=SPECS["transformer"].layers[:1])
    weights = random_weights(spec)
    seen = spec.with_mixers([WindowAttention(6, 2)])
    model = ReferenceModel(seen, weights)
    whole = model.logits(IDS)
    # Other tokens in the places that the last one does not see change nothing for it.
    others = IDS.copy()
    others[:, 2:18] = (others[:, 2:18] + 7) % 50
    np.testing.assert_allclose(model.logits(others)[:, -1], whole[:, -1], rtol=1e-12, atol=1e-12)
    for place in (0, 1, 18):
        other = IDS.copy()
        other[:, place] = (other[:, place] + 7) % 50
        assert np.abs(model.logits(other)[:, -1] - whole[:, -1]).max() > 1e-6


def test_its_preset_changes_no_tensor(tmp_path: Path) -> None:
    spec = SPECS["sliding"]
    linear, tensors = linearize(spec, lazy_weights(spec), LinearizeOptions("window", window=9))
    assert linear.mixers == (WindowAttention(9),) * spec.num_hidden_layers
    assert tensors.keys() == lazy_weights(spec).keys()
    assert not linear.is_transformer
    assert ModelSpec.from_dict(linear.to_dict()) == linear


@pytest.mark.parametrize(
    "choice",
    [{"feature_map": "relu"}, {"decay": "none"}, {"output_norm": "sum"}, {"gain": "per_head"}],
)
def test_choices_that_do_not_apply_are_refused(choice: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=f"`{next(iter(choice))}` does not apply to the preset win"):
        linear_spec(SPECS["transformer"], LinearizeOptions("window", **choice))  # type: ignore[arg-type]


def test_there_is_nothing_to_calibrate(tiny_transformer: Path, tmp_path: Path) -> None:
    options = LinearizeOptions("window")
    request = ConversionRequest(str(tiny_transformer), tmp_path / "out", options=options)
    assert not request.open().is_calibrated_by_default
    with pytest.raises(SupraError, match="the preset window has nothing to calibrate"):
        convert(replace(request, calibrate=lambda *_: pytest.fail("too late")))
    assert not (tmp_path / "out").exists()
    convert(request)
    assert open_source(tmp_path / "out").spec.provenance.recipe == "window"
