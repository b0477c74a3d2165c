"""RMSNorm on a CPU against its formula in float64, value and gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from supra_torch.ops.rms_norm import rms_norm  # noqa: E402

EPS = 1e-5


def _inputs(shape: tuple[int, ...], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x, torch.randn(shape[-1:], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 1), (3, 576), (0, 4, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_it_is_the_formula_and_its_gradients_are(shape: tuple[int, ...], scale: float) -> None:
    x, weight = _inputs(shape, scale)
    exact = [y.requires_grad_() for y in (x, weight)]
    ours = [y.detach().float().requires_grad_() for y in exact]
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    output = rms_norm(ours[0], ours[1], EPS)
    d_output = torch.ones_like(expected)
    gradients = torch.autograd.grad(expected, exact, d_output)
    found = torch.autograd.grad(output, ours, d_output.float())
    for got, wanted in zip((output, *found), (expected, *gradients), strict=True):
        # Sums of up to 576 terms, each rounded at 2^-24.
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        # The gradient of x is a difference of terms of the size 1 / scale.
        slack = 576**0.5 * 2**-23 * max(size, 1 / scale if got is found[0] else 0.0)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=slack)


def test_gradcheck_and_no_graph_break() -> None:
    x, weight = (y.requires_grad_() for y in _inputs((2, 3, 5), 1.0))
    assert torch.autograd.gradcheck(lambda *y: rms_norm(*y, EPS), (x, weight))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, EPS), rms_norm(x, weight, EPS))
