"""The final state alone is the one that attention ends with, and so are its gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_core.mixers import linear as reference  # noqa: E402
from supra_torch.ops import final_state as module  # noqa: E402
from supra_torch.ops.dense import linear_attention_dense  # noqa: E402
from supra_torch.ops.final_state import final_state  # noqa: E402
from tests.torch.test_chunked import random_inputs  # noqa: E402

# float64 sums of at most 1,000 products, relative to the largest value: 1,000 x 2^-53 = 1e-13.
TOLERANCE = 1e-12


def _counted(B: int, T: int, begins: int) -> Any:
    counted = torch.arange(T) >= begins
    return counted.expand(B, T)


@given(
    B=st.integers(1, 2), T=st.integers(1, 40), K=st.integers(1, 3), G=st.integers(1, 3),
    begins=st.integers(0, 39), at_once=st.integers(0, 50), normalise=st.booleans(),
)  # fmt: skip
def test_it_is_the_references(
    B: int, T: int, K: int, G: int, begins: int, at_once: int, normalise: bool
) -> None:
    """Counted from some token on, so many tokens at a time."""
    x = random_inputs(T, B, T, K, G, normalise=normalise)
    counted = _counted(B, T, begins)
    with patch.dict(module.AT_ONCE, cpu=at_once * 1000):
        found = final_state(x.k, x.v, x.slope, counted, normalise)
    _, expected = reference.exact_linear_attention(
        *(z.detach().numpy() for z in (x.q, x.k, x.v, torch.exp(-x.slope))),
        mask=counted.numpy(), normaliser="sum" if normalise else None,
    )  # fmt: skip
    most = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=TOLERANCE * most)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("begins", [None, 0, 13])
def test_gradients_are_those_of_the_dense_form(normalise: bool, begins: int | None) -> None:
    x = random_inputs(B=2, T=30, normalise=normalise)
    counted = None if begins is None else _counted(2, 30, begins)
    inputs = [tensor.requires_grad_() for tensor in (x.k, x.v, x.slope)]
    weight = torch.randn(2, 6, 5, 7 + normalise, dtype=torch.float64)

    def gradients(state: Any) -> list[Any]:
        return list(torch.autograd.grad((state * weight).sum(), inputs))

    with patch.dict(module.AT_ONCE, cpu=8 * 2 * 6 * 5 * 8):
        ours = gradients(final_state(x.k, x.v, x.slope, counted, normalise))
    dense = linear_attention_dense(x.q, x.k, x.v, x.slope, None, counted, None, normalise)
    for found, expected in zip(ours, gradients(dense[2]), strict=True):
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= TOLERANCE * scale


def test_halves_are_summed_in_float32() -> None:
    x = random_inputs(T=500, dtype=torch.bfloat16)
    found = final_state(x.k, x.v, x.slope, None, True)
    exact = final_state(x.k.double(), x.v.double(), x.slope.double(), None, True)
    assert found.dtype == torch.float32
    # Sums of 500 products, in order of size.
    assert (found - exact).abs().max() <= 500 * 2**-24 * exact.abs().max()


def test_backward_is_not_rounded_where_a_step_is() -> None:
    """A step runs backward inside autocast too."""
    found = []
    for enabled in (False, True):
        x = random_inputs(T=200, dtype=torch.float32)
        inputs = [tensor.requires_grad_() for tensor in (x.k, x.v, x.slope)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = final_state(*inputs, None, True)
            found.append(torch.autograd.grad(state.square().sum(), inputs))
    for exact, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)


def test_what_a_custom_operator_must_obey() -> None:
    x = random_inputs()
    arguments = (x.k.requires_grad_(), x.v.requires_grad_(), x.slope.requires_grad_())
    torch.library.opcheck(module._forward_op, (*arguments, _counted(1, 20, 3), True))
