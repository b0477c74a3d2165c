"""Rows that processes share have the losses and the gradients of whole rows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tests.torch import context_gradients  # noqa: E402
from tests.torch.uptraining import environment  # noqa: E402

# As in test_packing: float32 norms between exact sums.
TOLERANCE = 2e-5


@pytest.mark.parametrize(
    ("count", "which"),
    [(4, "few"), *(pytest.param(count, "all", marks=pytest.mark.slow) for count in (3, 4))],
)
def test_gradients_are_those_of_whole_rows(count: int, which: str, tmp_path: Path) -> None:
    """Parts shorter than a window, heads that are no multiple of the parts; ``all`` tiny models."""
    store, out = tmp_path / "store", tmp_path / "gradients.pt"
    command = [sys.executable, "-m", context_gradients.__name__]
    every = [
        subprocess.Popen(
            [*command, str(rank), str(count), which, str(store), str(out)], env=environment()
        )
        for rank in range(count)
    ]
    assert [process.wait(300) for process in every] == [0] * count
    for case, found in zip(context_gradients.cases(count, which), torch.load(out), strict=True):
        expected = context_gradients.of(case._replace(compiled=False), None)
        assert found.keys() == expected.keys()
        for name, whole in expected.items():
            scale = max(1e-3, float(whole.abs().max()))
            off = float((found[name] - whole).abs().max())
            assert off <= 10 * TOLERANCE * scale, (case, name, off / scale)
