"""Linearizing: what each preset builds, how close it starts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.errors import SpecError
from supra_core.model.decay import lightning_slopes, slopes
from supra_core.model.layout import parameter_count, tensor_shapes
from supra_core.model.reference import ReferenceModel
from supra_core.model.spec import (
    GroupNorm,
    LayerSpec,
    LearnedDecay,
    LightningDecay,
    LinearAttention,
    Projection,
    RetnetDecay,
    SoftmaxAttention,
    SumNormaliser,
)
from tests.tiny_models import SPECS, lazy_weights

TRANSFORMER = replace(SPECS["transformer"], attention_bias="none")


def test_paper_is_the_published_model() -> None:
    spec, tensors = linearize(
        TRANSFORMER, lazy_weights(TRANSFORMER), LinearizeOptions(preset="paper", seed=3)
    )
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, LinearAttention)
    assert mixer.feature_map.activation == "relu"
    assert mixer.feature_map.projection == Projection("all_heads", shared=False, bias=True)
    assert mixer.rope == "after"
    assert mixer.decay == LightningDecay()
    assert mixer.normaliser == GroupNorm(1e-5)
    assert mixer.key_scale == 10**-0.5
    weight = tensors["model.layers.1.self_attn.q_feature.weight"].read()
    # torch's default for a linear layer of 60 inputs: U(-1/sqrt(60), 1/sqrt(60)).
    assert np.abs(weight).max() <= 60**-0.5
    assert weight.std() == pytest.approx((60 * 3) ** -0.5, rel=0.05)
    other = tensors["model.layers.0.self_attn.q_feature.weight"].read()
    assert not np.array_equal(weight, other)


def test_paper_shares_the_map_without_groups() -> None:
    ungrouped = replace(TRANSFORMER, num_key_value_heads=6)
    spec, tensors = linearize(ungrouped, lazy_weights(ungrouped), LinearizeOptions(preset="paper"))
    assert "model.layers.0.self_attn.k_feature.weight" not in tensors
    assert list(tensors) == list(tensor_shapes(spec))


def test_aligned_keeps_every_weight_and_both_signs() -> None:
    weights = lazy_weights(TRANSFORMER)
    spec, tensors = linearize(TRANSFORMER, weights, LinearizeOptions())
    mixer = spec.layers[0].mixer
    assert isinstance(mixer, LinearAttention)
    assert isinstance(mixer.decay, LearnedDecay)
    assert isinstance(mixer.normaliser, SumNormaliser)
    assert mixer.feature_map.output_size == 20
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensors[name].read(), tensor.read())
    eye = tensors["model.layers.0.self_attn.k_feature.weight"].read()
    np.testing.assert_array_equal(eye, np.broadcast_to(np.eye(10), (2, 10, 10)))


def test_inside_the_window_a_windowed_model_is_the_transformer() -> None:
    weights = lazy_weights(TRANSFORMER)
    spec, tensors = linearize(TRANSFORMER, weights, LinearizeOptions(window=12))
    ids = np.random.default_rng(0).integers(0, 50, (1, 30))
    teacher = ReferenceModel(TRANSFORMER, weights).logits(ids)
    student = ReferenceModel(spec, tensors).logits(ids)
    np.testing.assert_allclose(student[:, :12], teacher[:, :12], rtol=0, atol=1e-10)
    assert np.abs(student[:, 20:] - teacher[:, 20:]).max() > 1e-3


def test_aligned_starts_closer_than_paper() -> None:
    weights = lazy_weights(TRANSFORMER)
    ids = np.random.default_rng(0).integers(0, 50, (2, 20))
    teacher = ReferenceModel(TRANSFORMER, weights).logits(ids)
    errors = []
    for preset in ("windowed", "paper"):
        spec, tensors = linearize(
            TRANSFORMER,
            weights,
            LinearizeOptions(preset=preset),  # type: ignore[arg-type]
        )
        errors.append(np.square(ReferenceModel(spec, tensors).logits(ids) - teacher).mean())
    assert errors[0] < errors[1]


def test_kept_layers_stay_softmax() -> None:
    spec, tensors = linearize(
        TRANSFORMER, lazy_weights(TRANSFORMER), LinearizeOptions(keep_softmax=(1,))
    )
    assert isinstance(spec.layers[1].mixer, SoftmaxAttention)
    assert list(tensors) == list(tensor_shapes(spec))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "`window` must be at least 1 token, not 0"),
        ({"preset": "paper", "window": 8}, "a window needs the sum normaliser"),
        ({"output_norm": "group_norm", "window": 8}, "a window needs the sum normaliser"),
        ({"preset": "paper", "output_norm": "sum", "feature_map": "none"}, "never negative"),
        ({"keep_softmax": (2,)}, "`keep_softmax` names layer 2"),
        ({"keep_softmax": (0, 1)}, "`keep_softmax` names all 2 layers"),
        ({"feature_map": "sigmoid"}, "`feature_map` 'sigmoid' is unknown"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        linearize(TRANSFORMER, lazy_weights(TRANSFORMER), LinearizeOptions(**options))  # type: ignore[arg-type]


def test_a_linear_model_is_not_linearized_again() -> None:
    with pytest.raises(SpecError, match="already has linear attention"):
        linearize(SPECS["paper"], lazy_weights(SPECS["paper"]), LinearizeOptions())


def test_parameters_that_linearizing_adds() -> None:
    spec, _ = linearize(TRANSFORMER, lazy_weights(TRANSFORMER), LinearizeOptions())
    # Two layers: maps and biases of 6 and 2 heads; decay, gain, far gain and sink a query head.
    added = 2 * (8 * (10 * 10 + 10) + 4 * 6)
    assert parameter_count(spec) - parameter_count(TRANSFORMER) == added


class TestSlopes:
    def test_power_of_two(self) -> None:
        np.testing.assert_allclose(lightning_slopes(8), 2.0 ** -np.arange(1, 9))

    def test_nine_heads_follow_alibi(self) -> None:
        expected = np.append(2.0 ** -np.arange(1, 9), 2.0**-0.5)
        np.testing.assert_allclose(lightning_slopes(9), expected)

    def test_start(self) -> None:
        np.testing.assert_allclose(lightning_slopes(4, 0.5), 0.5 * 4.0 ** -np.arange(4))

    def test_retnet_is_exact_for_late_heads(self) -> None:
        found = slopes(RetnetDecay(), 40)
        np.testing.assert_allclose(found, 2.0 ** (-5.0 - np.arange(40)), rtol=0.02)


def test_every_so_manieth_layer_stays() -> None:
    spec = replace(SPECS["transformer"], layers=(LayerSpec(SoftmaxAttention()),) * 5)
    options = LinearizeOptions(keep_softmax=(0,), keep_softmax_every=2)
    linear, tensors = linearize(spec, lazy_weights(spec), options)
    kept = [isinstance(layer.mixer, SoftmaxAttention) for layer in linear.layers]
    assert kept == [True, True, False, True, False]
    features = {name.split(".")[2] for name in tensors if "q_feature" in name}
    assert features == {"2", "4"}


def test_single_choices_of_the_mixer() -> None:
    spec = SPECS["transformer"]
    options = LinearizeOptions(
        output_norm="sum", decay="none", rope="before", feature_bias=False, gain="none"
    )
    linear, tensors = linearize(spec, lazy_weights(spec), options)
    mixer = linear.layers[0].mixer
    assert isinstance(mixer, LinearAttention)
    assert (mixer.rope, mixer.gain, mixer.decay.kind) == ("before", "none", "none")
    assert not [name for name in tensors if name.endswith((".gain", "feature.bias", "log_slope"))]
