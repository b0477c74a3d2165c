"""Every spec in MLX against the reference: forms, cuts, padding, mlx-lm's caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import (  # noqa: E402
    ArraysCache,
    BatchKVCache,
    load_prompt_cache,
    save_prompt_cache,
)

from supra_core.errors import LayoutError  # noqa: E402
from supra_core.mixers.positions import RotaryEmbedding  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_mlx.rotary import Rotary  # noqa: E402
from supra_mlx.weights import build_model, to_mlx, to_numpy  # noqa: E402
from tests.mlx.models import SPECS, mlx_backend, random_weights, reference  # noqa: E402

# Logits of order one after up to four layers of sums of at most 240 terms, each sum rounding at
# 2^-24 of its terms' size; a GroupNorm of a small output magnifies by up to eps^-1/2 = 300.
TOLERANCE = 5e-5


def _ids(spec: Any, B: int, T: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (B, T))


@pytest.fixture(scope="module", params=SPECS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A spec's reference and MLX backend."""
    spec = SPECS[request.param]
    return reference(spec), mlx_backend(spec)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "step"])
def test_forms_are_the_reference(pair: tuple[Any, Any], form: Form) -> None:
    definition, backend = pair
    ids = _ids(backend.spec, 2, 90)
    expected = definition.logits(ids)
    np.testing.assert_allclose(backend.logits(ids, form=form), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "step"])
@pytest.mark.parametrize("kind", ["left", "holes"])
def test_padding_changes_nothing(pair: tuple[Any, Any], form: Form, kind: str) -> None:
    definition, backend = pair
    T = 80
    ids, rng = _ids(backend.spec, 3, T), np.random.default_rng(2)
    left = np.arange(T) >= np.array([[0], [23], [79]])
    mask = left if kind == "left" else rng.random((3, T)) < 0.7
    expected = definition.logits(ids, mask=mask)
    found = backend.logits(ids, mask=mask, form=form)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


@given(name=st.sampled_from(sorted(SPECS)), cut=st.integers(1, 69), seed=st.integers(0, 99))
def test_a_prompt_may_be_cut_anywhere(name: str, cut: int, seed: int) -> None:
    backend = mlx_backend(SPECS[name])
    ids = _ids(backend.spec, 1, 70, seed)
    whole, _ = backend.prefill(ids)
    first, state = backend.prefill(ids[:, :cut])
    second, after = backend.prefill(ids[:, cut:], state)
    found = np.concatenate([first, second], axis=1)
    np.testing.assert_allclose(found, whole, rtol=0, atol=2 * TOLERANCE)
    # The first state is not touched by what came after it.
    again, _ = backend.prefill(ids[:, cut:], state)
    np.testing.assert_array_equal(again, second)
    restored = backend.state_from_arrays(backend.state_arrays(after))
    token = ids[:, -1]
    np.testing.assert_array_equal(backend.step(token, restored)[0], backend.step(token, after)[0])


@pytest.mark.parametrize("name", ["paper", "windowed", "hybrid", "sliding"])
def test_a_thousand_tokens(name: str) -> None:
    backend = mlx_backend(SPECS[name])
    ids = _ids(backend.spec, 1, 1000)
    expected = reference(SPECS[name]).logits(ids)
    np.testing.assert_allclose(backend.logits(ids), expected, rtol=0, atol=TOLERANCE)


def test_recurrent_states_do_not_grow_and_name_their_arrays() -> None:
    backend = mlx_backend(SPECS["windowed"])
    _, short = backend.prefill(_ids(backend.spec, 2, 5))
    _, long = backend.prefill(_ids(backend.spec, 2, 300))
    few, many = backend.state_arrays(short), backend.state_arrays(long)
    assert {n: a.shape for n, a in few.items()} == {n: a.shape for n, a in many.items()}
    assert many["layers.0.state"].shape == (2, 6, 12, 9)
    assert many["layers.0.state"].dtype == np.float32
    assert many["layers.1.positions"].tolist() == [300, 300]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_generators_caches(name: str) -> None:
    """mlx-lm calls the model with bounded caches and no mask of ours."""
    backend = mlx_backend(SPECS[name])
    ids = _ids(backend.spec, 1, 60)
    cache, parts = backend.model.make_cache(), []
    for piece in (slice(0, 31), *(slice(t, t + 1) for t in range(31, 50)), slice(50, 60)):
        parts.append(np.array(backend.model(mx.array(ids[:, piece]), cache=cache)))
    expected = reference(SPECS[name]).logits(ids)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["paper", "windowed", "hybrid"])
def test_mlx_lms_own_left_padding(name: str) -> None:
    spec = SPECS[name]
    backend = mlx_backend(spec)
    ids, padding = _ids(spec, 2, 40), [0, 13]
    mask = np.arange(40) >= np.array(padding)[:, None]
    caches = [
        ArraysCache(len(c.cache), padding) if isinstance(c, ArraysCache) else BatchKVCache(padding)
        for c in backend.model.make_cache(bounded=False)
    ]
    pieces = (slice(0, 20), slice(20, 21), slice(21, 40))
    found = [np.array(backend.model(mx.array(ids[:, p]), cache=caches)) for p in pieces]
    expected = reference(spec).logits(ids, mask=mask)
    found = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found[mask], expected[mask], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["paper", "windowed", "hybrid"])
def test_a_prompt_cache_survives_its_file(name: str, tmp_path: Path) -> None:
    model = mlx_backend(SPECS[name]).model
    ids = mx.array(_ids(model.spec, 1, 30))
    cache = model.make_cache()
    model(ids, cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    following = ids[:, :4]
    np.testing.assert_array_equal(model(following, cache=loaded), model(following, cache=cache))


def test_bfloat16_keeps_the_float32_tensors() -> None:
    spec = SPECS["windowed"]
    tensors = {name: LazyTensor.of(w) for name, w in random_weights(spec).items()}
    model = build_model(spec, tensors, "a random model", dtype="bfloat16")
    attention = model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == mx.bfloat16
    assert attention.log_slope.dtype == attention.log_far_gain.dtype == mx.float32
    cache = model.make_cache()
    assert model(mx.array([[1, 2, 3]]), cache=cache).dtype == mx.bfloat16
    assert cache[0][0].dtype == mx.float32
    weight = attention.q_proj.weight
    np.testing.assert_array_equal(to_numpy(to_mlx(to_numpy(weight))), to_numpy(weight))


def test_wrong_tensors_are_listed() -> None:
    spec = SPECS["paper"]
    tensors = {name: LazyTensor.of(w) for name, w in random_weights(spec).items()}
    del tensors["model.norm.weight"]
    with pytest.raises(LayoutError, match=r"somewhere: .*missing model\.norm\.weight"):
        build_model(spec, tensors, "somewhere")


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotation_is_exact_at_any_position(pairing: Any) -> None:
    from supra_core.mixers import rotary

    rope = RotaryEmbedding(pairing=pairing)
    positions = np.array([[0, 1, 4095, 10**6, 2**31 - 1]])
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 64)).astype(np.float32)
    expected = rotary.rotate(x.astype(np.float64), positions, rope)
    found = Rotary(rope).at(mx.array(positions.astype(np.int32)))(mx.array(x))
    # Angles in [-pi, pi] round at 2^-23, products of order 4 at 2^-22.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 2.0**-22)
