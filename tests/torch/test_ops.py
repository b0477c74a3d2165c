"""The operators in torch against the definition: any shape, any cut, any mask."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_core.mixers import linear as reference  # noqa: E402
from supra_torch.ops import linear_attention, linear_kl_divergence  # noqa: E402

# Relative to the largest value: sums of T products, each rounded at 2^-24, the errors of random
# sign; sqrt(1000) 2^-24 = 2e-6, and as much again for the decay's exponentials.
TOLERANCE = 5e-6

Implementation = Literal["reference", "chunked"]


def _inputs(
    seed: int, B: int, T: int, K: int, G: int, Dk: int, Dv: int, extra: int
) -> tuple[Any, Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    q = np.abs(rng.normal(size=(B, T, K * G, Dk)))
    k = np.abs(rng.normal(size=(B, T, K, Dk)))
    v = rng.normal(size=(B, T, K, Dv))
    decay = rng.uniform(0.4, 1.0, K * G)
    decay[0] = 1.0
    state = np.abs(rng.normal(size=(B, K * G, Dk, Dv + extra)))
    return q, k, v, decay, state


def _tensor(x: Any) -> Any:
    return None if x is None else torch.from_numpy(np.asarray(x)).float()


def _close(found: Any, expected: Any) -> None:
    scale = max(1e-30, np.abs(expected).max())
    assert np.abs(found.numpy() - expected).max() <= TOLERANCE * scale


@given(
    seed=st.integers(0, 2**16),
    B=st.integers(1, 3),
    T=st.integers(1, 150),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 2, 3, 8]),
    Dk=st.sampled_from([1, 10, 20, 64]),
    Dv=st.sampled_from([1, 7, 64]),
    normaliser=st.sampled_from([None, "sum"]),
    sinks=st.booleans(),
    masked=st.booleans(),
    started=st.booleans(),
    implementation=st.sampled_from(["reference", "chunked"]),
)
@example(0, 2, 1, 3, 3, 64, 64, "sum", True, False, True, "chunked")
@example(0, 2, 63, 3, 3, 64, 64, None, False, True, False, "chunked")
@example(0, 2, 64, 3, 3, 64, 64, "sum", False, True, True, "chunked")
@example(0, 2, 65, 3, 3, 64, 64, None, False, False, True, "chunked")
@example(0, 1, 1000, 3, 3, 20, 20, "sum", True, True, False, "chunked")
def test_operator_is_the_reference(
    seed: int, B: int, T: int, K: int, G: int, Dk: int, Dv: int,
    normaliser: Literal["sum"] | None, sinks: bool, masked: bool, started: bool,
    implementation: Implementation,
) -> None:  # fmt: skip
    q, k, v, decay, state = _inputs(seed, B, T, K, G, Dk, Dv, int(normaliser == "sum"))
    initial = state if started else None
    mask = np.random.default_rng(seed).random((B, T)) > 0.3 if masked else None
    sink = np.exp(np.random.default_rng(seed).normal(size=K * G)) if sinks and normaliser else None
    expected, final = reference.exact_linear_attention(
        q, k, v, decay, initial_state=initial, mask=mask, normaliser=normaliser, sink=sink
    )
    output, found = linear_attention(
        _tensor(q), _tensor(k), _tensor(v), torch.from_numpy(decay),
        initial_state=_tensor(initial),
        mask=None if mask is None else torch.from_numpy(mask),
        normaliser=normaliser,
        sink=_tensor(sink),
        implementation=implementation,
    )  # fmt: skip
    _close(output, expected)
    _close(found, final)


@pytest.mark.parametrize("normaliser", [None, "sum"])
def test_the_references_own_forms_agree(normaliser: Literal["sum"] | None) -> None:
    q, k, v, decay, state = _inputs(1, 2, 50, 3, 3, 10, 6, int(normaliser == "sum"))
    mask = np.random.default_rng(0).random((2, 50)) > 0.4
    both = [
        reference.exact_linear_attention(
            q, k, v, decay, initial_state=state, mask=mask, normaliser=normaliser, form=form
        )
        for form in ("recurrent", "parallel")
    ]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(both[0][1], both[1][1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 63, 64, 65, 128])
def test_a_cut_anywhere_changes_nothing(cut: int) -> None:
    q, k, v, decay, _ = (_tensor(x) for x in _inputs(2, 1, 129, 3, 3, 16, 16, 0))
    whole, final = linear_attention(q, k, v, decay)
    first, state = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], decay)
    second, last = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], decay, initial_state=state)
    _close(torch.cat([first, second], dim=1), whole.numpy())
    _close(last, final.numpy())


@pytest.mark.parametrize("normaliser", [None, "sum"])
def test_gradients_are_the_dense_forms(normaliser: Literal["sum"] | None) -> None:
    arrays = _inputs(3, 2, 75, 2, 3, 10, 6, int(normaliser == "sum"))
    mask = torch.from_numpy(np.random.default_rng(1).random((2, 75)) > 0.2)
    gradients = []
    for implementation in ("reference", "chunked"):
        inputs = [_tensor(x).requires_grad_() for x in arrays]
        output, state = linear_attention(
            *inputs[:4], initial_state=inputs[4], mask=mask, normaliser=normaliser,
            implementation=implementation,  # type: ignore[arg-type]
        )  # fmt: skip
        (output.square().mean() + state.square().mean()).backward()
        gradients.append([x.grad for x in inputs])
    for dense, chunked in zip(*gradients, strict=True):
        # Backward sums twice as many products as forward.
        assert (dense - chunked).abs().max() <= 4 * TOLERANCE * dense.abs().max()


def test_fast_decay_over_a_long_chunk_stays_finite() -> None:
    q, k, v, _, _ = (_tensor(x) for x in _inputs(4, 1, 512, 1, 2, 8, 8, 0))
    decay = torch.tensor([1e-4, 1.0])
    output, state = linear_attention(q, k, v, decay)
    assert output.isfinite().all()
    assert state.isfinite().all()


def test_bfloat16_keeps_a_float32_state() -> None:
    q, k, v, decay, _ = _inputs(5, 1, 200, 2, 2, 16, 16, 1)
    expected, _ = reference.exact_linear_attention(q, k, v, decay, normaliser="sum")
    inputs = (_tensor(x).bfloat16() for x in (q, k, v))
    output, state = linear_attention(*inputs, torch.from_numpy(decay), normaliser="sum")
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    # Averages of inputs rounded at 2^-9, the scores rounded once more.
    assert np.abs(output.float().numpy() - expected).max() <= 4 * 2**-9 * np.abs(v).max()


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v, decay, _ = (_tensor(x) for x in _inputs(6, 1, 5, 2, 2, 4, 4, 0))
    with pytest.raises(ValueError, match="do not fit together"):
        linear_attention(q, k[:, :4], v, decay)
    with pytest.raises(ValueError, match="decay must have shape"):
        linear_attention(q, k, v, decay[:1])
    with pytest.raises(ValueError, match="initial_state must have shape"):
        linear_attention(q, k, v, decay, initial_state=torch.zeros(1, 4, 4, 5))
    with pytest.raises(ValueError, match="unknown implementation"):
        linear_attention(q, k, v, decay, implementation="quick")  # type: ignore[arg-type]


def test_kl_divergence_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(70, 12, generator=generator) for _ in range(2))
    weight, teacher_weight = (torch.randn(33, 12, generator=generator) for _ in range(2))
    results = []
    for chunk in (16, None):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if chunk is not None:
            loss = linear_kl_divergence(h, w, teacher, teacher_weight, chunk)
        else:
            loss = torch.nn.functional.kl_div(
                (h @ w.T).log_softmax(-1),
                (teacher @ teacher_weight.T).log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
        (2 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
