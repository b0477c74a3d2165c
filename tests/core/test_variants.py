"""A windowed model taken apart, against the definition with the same part taken out of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from supra_core.conversion.variants import is_windowed, window_alone, without_window
from supra_core.errors import SpecError
from supra_core.mixers import linear as definition
from supra_core.mixers.linear import LinearAttention
from supra_core.model.layout import check_tensors
from supra_core.model.reference import ReferenceModel
from supra_core.model.spec import ModelSpec
from tests.tiny_models import SPECS, lazy_weights

WINDOWED = ["windowed", "windowed_between", "windowed_sink", "hybrid"]
IDS = np.random.default_rng(1).integers(50, size=(2, 90))


def _dense(near: bool) -> Any:
    """The windowed mixer as one dense sum in which only one of the two kinds of weights exists."""

    def mixer(
        q: Any, k: Any, v: Any, phi_q: Any, phi_k: Any, gamma: Any, far_gain: Any, window: int,
        state: Any, sink: Any = None,
    ) -> Any:  # fmt: skip
        heads = q.shape[1]
        k, v, phi_k = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v, phi_k))
        age = np.arange(len(q))[:, None] - np.arange(len(q))
        if near:
            weights = np.exp(np.einsum("thd,jhd->htj", q, k) / np.sqrt(q.shape[-1]))
            weights = weights * ((age >= 0) & (age < window))
        else:
            # Counted from the window's edge, as the definition counts it, for every earlier token.
            decayed = far_gain[:, None, None] * gamma[:, None, None] ** (age - window)
            weights = np.einsum("thd,jhd->htj", phi_q, phi_k) * decayed * (age >= 0)
        total = weights.sum(-1)
        if sink is not None and not near:
            total = total + sink[:, None]
        return np.einsum("htj,jhv->thv", weights, v) / total.T[..., None], {}

    return mixer


def _expected(spec: ModelSpec, near: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(definition, "exact_windowed_attention", _dense(near))
        return ReferenceModel(spec, lazy_weights(spec)).logits(IDS)


@pytest.mark.parametrize("name", WINDOWED)
def test_without_its_window_only_linear_weights_are_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS[name]
    linear, tensors = without_window(spec, lazy_weights(spec))
    assert not is_windowed(linear)
    check_tensors(linear, {key: tensor.shape for key, tensor in tensors.items()}, name)
    found = ReferenceModel(linear, tensors).logits(IDS)
    # The moved sink is stored in float32.
    np.testing.assert_allclose(found, _expected(spec, False, monkeypatch), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_alone_is_softmax_over_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    same, tensors = window_alone(spec, lazy_weights(spec))
    check_tensors(same, {key: tensor.shape for key, tensor in tensors.items()}, name)
    found = ReferenceModel(same, tensors).logits(IDS)
    np.testing.assert_allclose(found, _expected(spec, True, monkeypatch), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("take", [without_window, window_alone])
def test_each_part_is_another_model(take: Any) -> None:
    spec = SPECS["windowed_sink"]
    whole = ReferenceModel(spec, lazy_weights(spec)).logits(IDS)
    part = ReferenceModel(*take(spec, lazy_weights(spec))).logits(IDS)
    # The first token sees only itself either way, up to the sink; later ones do not.
    assert np.abs(whole - part)[:, 20:].max() > 1e-2


@pytest.mark.parametrize("take", [without_window, window_alone])
def test_other_backends_agree(take: Any) -> None:
    """In float32 nothing underflows or becomes NaN."""
    torch = pytest.importorskip("torch")
    from supra_torch.inference.backend import TorchBackend
    from supra_torch.model.model import build

    spec, tensors = take(SPECS["windowed_sink"], lazy_weights(SPECS["windowed_sink"]))
    model = TorchBackend(build(spec, tensors), torch.device("cpu"))
    expected = ReferenceModel(spec, tensors).logits(IDS)
    for form in ("parallel", "recurrent", "step"):
        np.testing.assert_allclose(model.logits(IDS, form=form), expected, atol=2e-4)


def test_mlx_agrees(tmp_path: Any) -> None:
    pytest.importorskip("mlx")
    from supra_core.artifact import folder as artifact
    from supra_core.runtime import backend

    spec = SPECS["windowed_sink"]
    for take in (without_window, window_alone):
        folder = tmp_path / take.__name__
        part, tensors = take(spec, lazy_weights(spec))
        artifact.write(folder, part, tensors, {}, dtype="float32")
        found = backend.load("mlx", folder).logits(IDS, form="recurrent")
        np.testing.assert_allclose(found, ReferenceModel(part, tensors).logits(IDS), atol=2e-4)


@pytest.mark.parametrize("name", ["sink", "transformer", "sliding"])
def test_a_model_without_a_window_has_no_parts(name: str) -> None:
    spec = SPECS[name]
    assert not is_windowed(spec)
    for take in (without_window, window_alone):
        with pytest.raises(SpecError, match="window"):
            take(spec, lazy_weights(spec))


def test_only_windowed_layers_change() -> None:
    spec = SPECS["hybrid"]
    linear, _ = without_window(spec, lazy_weights(spec))
    changed = [a.mixer != b.mixer for a, b in zip(spec.layers, linear.layers, strict=True)]
    assert changed == [True, False, False, False]
    assert isinstance(linear.layers[0].mixer, LinearAttention)
