"""Windowed attention against its formula, all weights at once, with autograd's gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_torch.ops import windowed_attention  # noqa: E402
from supra_torch.ops.window_softmax import window_softmax  # noqa: E402


def _inputs(
    seed: int, B: int, T: int, K: int, G: int, d: int, Dk: int, Dv: int, dtype: Any
) -> list[Any]:
    """q, k, v, phi_q, phi_k, decay, log_far_gain, log_sink."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    H = K * G
    tensors = [
        noise(B, T, H, d), noise(B, T, K, d), noise(B, T, K, Dv),
        noise(B, T, H, Dk).abs(), noise(B, T, K, Dk).abs(),
    ]  # fmt: skip
    decay, gain, sink = torch.exp(-0.2 * noise(H).abs()), noise(H), noise(H)
    return [x.to(dtype).requires_grad_() for x in tensors] + [
        decay.requires_grad_(),
        gain.requires_grad_(),
        sink.requires_grad_(),
    ]


def _attend(inputs: list[Any], window: int, **given: Any) -> tuple[Any, Any]:
    """The operator on what :func:`_inputs` returns, with or without its last, the sink."""
    sink = inputs[7] if len(inputs) > 7 else None
    return windowed_attention(*inputs[:7], window, log_sink=sink, **given)


def _cut(inputs: list[Any], piece: slice) -> list[Any]:
    return [*(x[:, piece] for x in inputs[:5]), *inputs[5:]]


def _formula(
    q: Any, k: Any, v: Any, phi_q: Any, phi_k: Any, decay: Any, gain: Any, sink: Any | None = None,
    *, window: int, mask: Any,
) -> Any:  # fmt: skip
    """The docstring's sums over all pairs; ages count valid tokens."""
    G = q.shape[2] // k.shape[2]
    q, k, v, phi_q, phi_k = (x.transpose(1, 2) for x in (q, k, v, phi_q, phi_k))
    k, v, phi_k = (x.repeat_interleave(G, dim=1) for x in (k, v, phi_k))
    age = mask.cumsum(1)
    distance = (age[:, :, None] - age[:, None, :])[:, None]
    seen = mask[:, None, None, :] & mask[:, None, :, None] & (distance >= 0)
    near = torch.exp(q @ k.mT / math.sqrt(q.shape[-1])) * (seen & (distance < window))
    lag = (distance - window).clamp(min=0)
    far = torch.exp(gain)[:, None, None] * decay[:, None, None] ** lag * (phi_q @ phi_k.mT)
    far = far * (seen & (distance >= window))
    weights = near + far
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink)[:, None, None] * (far.sum(-1, keepdim=True) > 0)
    return ((weights @ v) / torch.where(total == 0, 1.0, total)).transpose(1, 2)


@given(
    seed=st.integers(0, 2**16),
    T=st.sampled_from([1, 5, 31, 32, 33, 64, 100, 200]),
    window=st.sampled_from([1, 5, 32, 40, 64, 70]),
    K=st.integers(1, 2),
    G=st.sampled_from([1, 3]),
    masked=st.booleans(),
    sinks=st.booleans(),
)
@example(0, 200, 70, 2, 3, True, True)
@example(0, 600, 64, 2, 3, False, False)
def test_output_and_gradients_are_the_formulas(
    seed: int, T: int, window: int, K: int, G: int, masked: bool, sinks: bool
) -> None:
    inputs = _inputs(seed, 2, T, K, G, 6, 5, 7, torch.float64)[: 8 if sinks else 7]
    mask = torch.ones(2, T, dtype=torch.bool)
    if masked:
        mask = torch.rand(2, T, generator=torch.Generator().manual_seed(seed)) > 0.3
    expected = _formula(*inputs, window=window, mask=mask)
    output, _ = _attend(inputs, window, mask=mask if masked else None)
    torch.manual_seed(seed)
    weights = torch.randn(output.shape, dtype=output.dtype) * mask[..., None, None]
    pairs = zip(
        [output * mask[..., None, None], *torch.autograd.grad(output, inputs, weights)],
        [expected, *torch.autograd.grad(expected, inputs, weights)],
        strict=True,
    )
    # The slope alone is float32: 2^-24 of it, times ages of up to 600 tokens.
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max())


@pytest.mark.parametrize("cut", [1, 31, 64, 65, 99])
def test_gradients_flow_through_the_state_at_any_cut(cut: int) -> None:
    inputs = _inputs(0, 2, 100, 2, 3, 6, 5, 7, torch.float64)
    whole, _ = _attend(inputs, 8)
    first, state = _attend(_cut(inputs, slice(cut)), 8)
    second, _ = _attend(_cut(inputs, slice(cut, None)), 8, initial_state=state)
    both = torch.cat([first, second], dim=1)
    torch.manual_seed(cut)
    weights = torch.randn(both.shape, dtype=both.dtype)
    for ours, theirs in zip(
        [both, *torch.autograd.grad(both, inputs, weights)],
        [whole, *torch.autograd.grad(whole, inputs, weights)],
        strict=True,
    ):
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


def test_bfloat16_is_near_float64() -> None:
    inputs = _inputs(0, 2, 200, 2, 3, 16, 16, 16, torch.bfloat16)
    output, _ = _attend(inputs, 64)
    exact = [x.detach().double() for x in inputs]
    expected = _formula(*exact, window=64, mask=torch.ones(2, 200, dtype=torch.bool))
    # An average of v: scores of up to 5 rounded at 2^-9, and the weights and the average again.
    error = (output.double() - expected).abs().max()
    assert error <= 8 * 2**-9 * exact[2].abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 40, 6, 4), (2, 45, 2, 4), (2, 45, 2, 3), (2, 40, 6, 3), (2, 40, 6)]
    q, k, v, far, mass = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    valid = torch.rand(2, 45, generator=generator) > 0.3 if masked else None
    torch.library.opcheck(torch.ops.supra.window_softmax.default, (q, k, v, valid, far, mass, 5))
    torch.library.opcheck(
        torch.ops.supra.window_softmax_backward.default,
        (far.detach(), q.detach(), k.detach(), v.detach(), valid, far.detach(), mass.detach(), 5),
        test_utils=["test_schema", "test_faketensor"],
    )
    assert torch.autograd.gradcheck(
        lambda *x: window_softmax(x[0], x[1], x[2], valid, x[3], x[4], 5),
        (q, k, v, far, mass),
        fast_mode=True,
    )


def test_compiles_without_a_graph_break() -> None:
    inputs = _inputs(0, 2, 70, 2, 3, 6, 5, 7, torch.float32)

    def loss(*x: Any) -> Any:
        return _attend(list(x), 8)[0].square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
