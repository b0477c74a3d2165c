"""The rotation of channel pairs against the definition, and its gradient against autograd's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.mixers import rotary  # noqa: E402
from supra_core.mixers.positions import RotaryEmbedding  # noqa: E402
from supra_torch.ops import rotated  # noqa: E402


def _tables(positions: Any, channels: int) -> tuple[Any, Any]:
    theta = torch.from_numpy(rotary.inverse_frequencies(RotaryEmbedding(), channels))
    angles = positions.double()[..., None, None] * theta
    return angles.cos().float(), angles.sin().float()


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("rows", [1, 3])
def test_it_is_the_definition(pairing: Any, rows: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 11, 5, 6))
    positions = rng.integers(0, 70_000, (rows, 11))
    expected = rotary.rotate(x, positions, RotaryEmbedding(pairing=pairing))
    tables = _tables(torch.from_numpy(positions), 6)
    for dtype, rounding in ((torch.float32, 2**-22), (torch.bfloat16, 2**-7)):
        found = rotated(torch.from_numpy(x).to(dtype), *tables, pairing == "half")
        assert found.dtype == dtype
        # A few roundings of values up to 4 or so: of x, of two products and their sum.
        assert np.abs(found.float().numpy() - expected).max() <= rounding * np.abs(x).max()


@pytest.mark.parametrize("half", [True, False])
def test_its_gradient_is_the_rotation_back(half: bool) -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cos, sin = _tables(torch.arange(5)[None], 4)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    rotated(x, cos, sin, half).backward(upstream)
    # A rotation keeps scalar products: <R x, u> = <x, R^T u>.
    torch.testing.assert_close(
        (x * x.grad).sum(), (rotated(x, cos, sin, half) * upstream).sum(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(rotated(x.grad, cos, sin, half), upstream, rtol=1e-5, atol=1e-5)
