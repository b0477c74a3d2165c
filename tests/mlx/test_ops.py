"""The operators against the reference's float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from supra_core.mixers import linear as reference  # noqa: E402
from supra_mlx import ops  # noqa: E402
from supra_mlx.windowed_attention import in_order, windowed_attention  # noqa: E402

# Rounding of float32, 2^-24, times the few dozen roundings that one term passes through, times
# the sum of the terms' sizes, which the operator itself gives for absolute values.
_ROUNDINGS = 64 * 2.0**-24

LENGTHS = (1, 2, 63, 64, 65, 130)


def _inputs(seed: int, B: int, T: int, H: int, K: int, Dk: int, Dv: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    q, k = (np.abs(rng.normal(size=(B, T, heads, Dk))).astype(np.float32) for heads in (H, K))
    v = rng.normal(size=(B, T, K, Dv)).astype(np.float32)
    gamma = np.exp(-np.exp2(-8.0 * rng.random(H))).astype(np.float32)
    return [q, k, v, gamma]


def _mask(seed: int, B: int, T: int, kind: str) -> Any:
    rng = np.random.default_rng(seed + 1)
    if kind == "none":
        return None
    if kind == "left":
        return np.arange(T) >= rng.integers(0, T, size=(B, 1))
    return rng.random((B, T)) < 0.6


def _mlx(array: Any) -> Any:
    return None if array is None else mx.array(array)


@given(
    seed=st.integers(0, 999),
    T=st.sampled_from(LENGTHS),
    heads=st.sampled_from([(1, 1), (6, 2), (9, 3), (5, 5)]),
    sizes=st.sampled_from([(5, 7), (12, 3), (64, 64)]),
    normaliser=st.sampled_from([None, "sum"]),
    sinks=st.booleans(),
    mask_kind=st.sampled_from(["none", "left", "holes"]),
    with_state=st.booleans(),
)
def test_linear_attention_is_the_reference(
    seed: int, T: int, heads: tuple[int, int], sizes: tuple[int, int],
    normaliser: Literal["sum"] | None, sinks: bool, mask_kind: str, with_state: bool,
) -> None:  # fmt: skip
    B, (H, K), (Dk, Dv) = 2, heads, sizes
    q, k, v, gamma = _inputs(seed, B, T, H, K, Dk, Dv)
    mask, state = _mask(seed, B, T, mask_kind), None
    if with_state:
        shape = (B, H, Dk, Dv + (normaliser == "sum"))
        state = np.abs(np.random.default_rng(seed + 2).normal(size=shape)).astype(np.float32)
    sink = np.exp(np.random.default_rng(seed).normal(size=H)) if sinks and normaliser else None
    expected, final = reference.exact_linear_attention(
        q, k, v, gamma, initial_state=state, mask=mask, normaliser=normaliser, sink=sink
    )
    out, after = ops.linear_attention(
        *map(mx.array, (q, k, v, gamma)),
        initial_state=_mlx(state), mask=_mlx(mask), normaliser=normaliser, sink=_mlx(sink),
    )  # fmt: skip
    size, final_size = reference.exact_linear_attention(
        q, k, np.abs(v), gamma, initial_state=state, mask=mask, normaliser=normaliser
    )
    assert out.shape == (B, T, H, Dv)
    assert after.dtype == mx.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=_ROUNDINGS * (size.max() + 1))
    np.testing.assert_allclose(after, final, rtol=0, atol=_ROUNDINGS * (final_size.max() + 1))


@pytest.mark.parametrize("normaliser", [None, "sum"])
def test_a_thousand_tokens_cut_in_two(normaliser: Literal["sum"] | None) -> None:
    q, k, v, gamma = _inputs(3, 1, 1000, 3, 1, 6, 5)
    expected, final = reference.exact_linear_attention(q, k, v, gamma, normaliser=normaliser)
    parts, state = [], None
    for piece in (slice(0, 1), slice(1, 334), slice(334, 1000)):
        out, state = ops.linear_attention(
            *(mx.array(x[:, piece]) for x in (q, k, v)), mx.array(gamma),
            initial_state=state, normaliser=normaliser,
        )  # fmt: skip
        parts.append(np.array(out))
    bound = _ROUNDINGS * np.abs(expected).max() * 4
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, rtol=0, atol=bound)
    np.testing.assert_allclose(state, final, rtol=0, atol=_ROUNDINGS * np.abs(final).max() * 4)


@pytest.mark.parametrize("gamma", [0.0, 1e-30, 0.5, 1.0])
def test_any_decay_stays_finite(gamma: float) -> None:
    q, k, v, _ = _inputs(4, 1, 200, 2, 2, 4, 4)
    decay = np.full(2, gamma, dtype=np.float32)
    expected, _ = reference.exact_linear_attention(
        q, k, v, np.maximum(decay, 1e-38), form="recurrent"
    )
    out, state = ops.linear_attention(*map(mx.array, (q, k, v, decay)))
    assert np.isfinite(np.array(state)).all()
    np.testing.assert_allclose(out, expected, rtol=0, atol=_ROUNDINGS * np.abs(expected).max())


def test_the_output_has_the_type_of_q_and_the_state_is_float32() -> None:
    q, k, v, gamma = (mx.array(x) for x in _inputs(5, 1, 9, 2, 1, 4, 4))
    out, state = ops.linear_attention(*(x.astype(mx.bfloat16) for x in (q, k, v)), gamma)
    assert (out.dtype, state.dtype) == (mx.bfloat16, mx.float32)


def test_misfits_are_named() -> None:
    q, k, v, gamma = (mx.array(x) for x in _inputs(6, 1, 3, 4, 2, 4, 4))
    with pytest.raises(ValueError, match="do not fit"):
        ops.linear_attention(q[:, :, :3], k, v, gamma)
    with pytest.raises(ValueError, match="decay"):
        ops.linear_attention(q, k, v, gamma[:2])
    with pytest.raises(ValueError, match="initial_state"):
        ops.linear_attention(q, k, v, gamma, initial_state=mx.zeros((1, 4, 4, 4)), normaliser="sum")
    with pytest.raises(ValueError, match="mask"):
        ops.linear_attention(q, k, v, gamma, mask=mx.ones((1, 2), dtype=mx.bool_))


@given(
    seed=st.integers(0, 999),
    T=st.sampled_from(LENGTHS),
    window=st.sampled_from([1, 5, 64, 100]),
    mask_kind=st.sampled_from(["none", "left", "holes"]),
    sinks=st.booleans(),
    cut=st.floats(0, 1),
)
def test_windowed_attention_is_the_reference(
    seed: int, T: int, window: int, mask_kind: str, sinks: bool, cut: float
) -> None:
    B, H, K, d, Dk, Dv = 2, 6, 2, 4, 5, 3
    rng = np.random.default_rng(seed)
    phi_q, phi_k, v, gamma = _inputs(seed, B, T, H, K, Dk, Dv)
    q, k = ((3 * rng.normal(size=(B, T, heads, d))).astype(np.float32) for heads in (H, K))
    log_gain = rng.normal(size=H).astype(np.float32)
    log_sink = rng.normal(size=H).astype(np.float32) if sinks else None
    mask = _mask(seed, B, T, mask_kind)
    memory, parts = None, []
    seen = np.zeros(B, dtype=np.int32)
    for piece in (slice(0, int(cut * T)), slice(int(cut * T), T)):
        if piece.start == piece.stop:
            continue
        out, memory = windowed_attention(
            *(mx.array(x[:, piece]) for x in (q, k, v, phi_q, phi_k)), mx.array(gamma),
            mx.array(log_gain), window, log_sink=_mlx(log_sink), memory=memory, seen=mx.array(seen),
            mask=None if mask is None else mx.array(mask[:, piece]),
        )  # fmt: skip
        parts.append(np.array(out))
        length = piece.stop - piece.start
        seen += np.int32(length) if mask is None else mask[:, piece].sum(axis=1, dtype=np.int32)
    keys, _, _, held = in_order(memory, mx.array(seen))
    found = np.concatenate(parts, axis=1)
    assert np.isfinite(found).all()
    for row in range(B):
        valid = np.ones(T, dtype=bool) if mask is None else mask[row]
        if not valid.any():
            continue
        expected, last = reference.exact_windowed_attention(
            *(x[row, valid].astype(np.float64) for x in (q, k, v, phi_q, phi_k)),
            gamma.astype(np.float64), np.exp(log_gain.astype(np.float64)), window, {},
            None if log_sink is None else np.exp(log_sink.astype(np.float64)),
        )  # fmt: skip
        # Weighted means of v; a score's rounding (|s| < 2^7) is a relative error of its weight.
        np.testing.assert_allclose(found[row, valid], expected, rtol=0, atol=2.0**-24 * 2**8)
        state = np.array(memory.state[row])
        scale = np.abs(last["state"]).max() + 1
        np.testing.assert_allclose(state, last["state"], rtol=0, atol=_ROUNDINGS * scale)
        kept = min(int(valid.sum()), window)
        assert np.array(held[row]).sum() == kept
        np.testing.assert_array_equal(
            np.array(keys[row])[window - kept :], last["keys"].astype(np.float32)
        )


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [1, 7, 16])
def test_windowed_steps_are_the_whole(rows: int, window: int) -> None:
    T, H, K, d, Dk, Dv = 50, 6, 2, 4, 5, 3
    phi_q, phi_k, v, gamma = _inputs(8, rows, T, H, K, Dk, Dv)
    rng = np.random.default_rng(9)
    q, k = ((3 * rng.normal(size=(rows, T, heads, d))).astype(np.float32) for heads in (H, K))
    tokens = [mx.array(x) for x in (q, k, v, phi_q, phi_k)]
    rest = (mx.array(gamma), mx.array(rng.normal(size=H).astype(np.float32)), window)
    sink = mx.array(rng.normal(size=H).astype(np.float32))
    expected, last = windowed_attention(*tokens, *rest, log_sink=sink)
    for begun in (0, 5, 29):
        memory, seen, parts = None, mx.zeros((rows,), dtype=mx.int32), []
        pieces = [slice(0, begun), *(slice(t, t + 1) for t in range(begun, T))]
        for piece in pieces:
            if piece.start == piece.stop:
                continue
            out, memory = windowed_attention(
                *(x[:, piece] for x in tokens), *rest, log_sink=sink, memory=memory, seen=seen
            )
            seen = seen + out.shape[1]
            parts.append(out)
        found = np.array(mx.concatenate(parts, axis=1))
        np.testing.assert_allclose(found, np.array(expected), rtol=0, atol=2.0**-24 * 2**8)
        for mine, theirs in zip(memory[1:], last[1:], strict=True):
            np.testing.assert_array_equal(np.array(mine), np.array(theirs))
        scale = np.abs(np.array(last.state)).max() + 1
        np.testing.assert_allclose(memory.state, last.state, rtol=0, atol=_ROUNDINGS * scale)


def test_mlx_still_asks_for_the_variable_that_keeps_float32_exact() -> None:
    """What an M5 would compute otherwise can be tried on an M5 alone."""
    header = Path(mx.__file__).parent / "include" / "mlx" / "utils.h"
    if not header.is_file():
        pytest.skip("mlx came without its headers")
    assert 'get_var("MLX_ENABLE_TF32", ' in header.read_text("utf-8")
