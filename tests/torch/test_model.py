"""Every spec in torch against the reference: forms, cuts, padding, states on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.errors import LayoutError  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.model.mixers import softmax  # noqa: E402
from supra_torch.model.model import build, lazy_tensors  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import DISTINCT, SPECS, lazy_weights, random_weights, reference  # noqa: E402

# Logits of order one after up to four layers of sums of at most 240 terms, each rounding at
# 2^-24; a GroupNorm of a small output magnifies by up to eps^-1/2 = 300.
TOLERANCE = 5e-5


def _backend(name: str) -> TorchBackend:
    spec = SPECS[name]
    return TorchBackend(build(spec, lazy_weights(spec)), torch.device("cpu"))


def _ids(backend: Any, B: int, T: int) -> Any:
    return np.random.default_rng(1).integers(0, backend.spec.vocab_size, (B, T))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("form", ["parallel", "recurrent", "step"])
def test_forms_are_the_reference(name: str, form: Form) -> None:
    backend = _backend(name)
    ids = _ids(backend, 2, 90)
    expected = reference(backend.spec).logits(ids)
    np.testing.assert_allclose(backend.logits(ids, form=form), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", thinned(SPECS, DISTINCT))
@pytest.mark.parametrize("form", ["parallel", "recurrent", "step"])
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padding_changes_nothing(name: str, form: Form, kind: str) -> None:
    backend, T = _backend(name), 80
    ids = _ids(backend, 3, T)
    if kind == "left":
        mask = np.arange(T) >= np.array([[0], [23], [79]])
    else:
        mask = np.random.default_rng(2).random((3, T)) > 0.4
    expected = reference(backend.spec).logits(ids, mask=mask)
    found = backend.logits(ids, mask=mask, form=form)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["whole", "left", "holes"])
@pytest.mark.parametrize("name", ["sliding", "hybrid", "sandwich", "transformer"])
def test_some_queries_at_a_time(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for long rows; the state before them is of another number of tokens."""
    backend = _backend(name)
    ids, mask = _ids(backend, 2, 75), np.ones((2, 75), dtype=bool)
    if kind == "left":
        mask[1, :23] = False
    elif kind == "holes":
        mask = np.random.default_rng(2).random((2, 75)) > 0.4
    given = None if kind == "whole" else mask
    expected = backend.logits(ids, mask=given)
    monkeypatch.setattr(softmax, "_QUERIES", 17)
    for form in ("parallel", "recurrent"):
        found = backend.logits(ids, mask=given, form=form)
        np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SPECS)
def test_a_state_survives_the_disk(name: str) -> None:
    backend = _backend(name)
    ids = _ids(backend, 2, 40)
    _, state = backend.prefill(ids[:, :33])
    restored = backend.state_from_arrays(backend.state_arrays(state))
    for token in range(33, 40):
        ours, state = backend.step(ids[:, token], state)
        theirs, restored = backend.step(ids[:, token], restored)
        np.testing.assert_array_equal(ours, theirs)


def test_losses_are_those_of_the_logits() -> None:
    backend = _backend("hybrid")
    ids = _ids(backend, 2, 50)
    logits = reference(backend.spec).logits(ids)[:, :-1]
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, ids[:, 1:, None], -1)[..., 0])
    for form in ("parallel", "step"):
        found, greedy = backend.token_scores(ids, form=form)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=0, atol=2 * TOLERANCE)
        np.testing.assert_array_equal(greedy, logits.argmax(-1) == ids[:, 1:])


@pytest.mark.parametrize("name", SPECS)
def test_after_a_padded_prompt_no_mask_is_needed(name: str) -> None:
    """What a window drops is padding before it is a token."""
    backend, T = _backend(name), 60
    ids = _ids(backend, 3, T)
    mask = np.random.default_rng(3).random((3, T)) > 0.4
    mask[:, 50:] = True
    expected = reference(backend.spec).logits(ids, mask=mask)[:, 50:]
    _, state = backend.prefill(ids[:, :50], mask=mask[:, :50])
    found = []
    for token in range(50, T):
        logits, state = backend.step(ids[:, token], state)
        found.append(logits)
    np.testing.assert_allclose(np.stack(found, 1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["windowed", "sliding"])
def test_a_state_of_fixed_size(name: str) -> None:
    backend = _backend(name)
    _, early = backend.prefill(_ids(backend, 1, 100))
    _, late = backend.prefill(_ids(backend, 1, 300))
    shapes = [
        {name: array.shape for name, array in backend.state_arrays(state).items()}
        for state in (early, late)
    ]
    assert shapes[0] == shapes[1]


def test_weights_come_back_as_they_were() -> None:
    spec = SPECS["hybrid"]
    model = build(spec, lazy_weights(spec))
    for name, tensor in lazy_tensors(model).items():
        np.testing.assert_array_equal(tensor.read(), random_weights(spec)[name])


def test_loading_is_strict() -> None:
    spec = SPECS["paper"]
    weights = lazy_weights(spec)
    del weights["model.norm.weight"]
    with pytest.raises(LayoutError, match=r"missing model\.norm\.weight"):
        build(spec, weights)


@pytest.mark.parametrize("name", SPECS)
def test_products_are_taken_in_the_type_of_autocast(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softmax is float32 under autocast; on a GPU its products would miss the fast kernel."""
    from supra_torch.model.mixers import linear
    from supra_torch.ops import linear_attention

    seen: list[Any] = []

    def recorded(q: Any, k: Any, v: Any, *others: Any, **named: Any) -> Any:
        seen.extend((q.dtype, k.dtype, v.dtype))
        return linear_attention(q, k, v, *others, **named)

    monkeypatch.setattr(linear, "linear_attention", recorded)
    spec = SPECS[name]
    model = build(spec, lazy_weights(spec), dtype=torch.float32)
    ids = torch.zeros(1, 20, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert set(seen) <= {torch.bfloat16}
