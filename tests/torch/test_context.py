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


def test_gradients_are_those_of_whole_rows(tmp_path: Path) -> None:
    """Every tiny model, shared by three; parts shorter than a window too."""
    store, out = tmp_path / "store", tmp_path / "gradients.pt"
    command = [sys.executable, "-m", context_gradients.__name__]
    three = [
        subprocess.Popen([*command, str(rank), "3", str(store), str(out)], env=environment())
        for rank in range(3)
    ]
    assert [process.wait(300) for process in three] == [0, 0, 0]
    for case, found in zip(context_gradients.CASES, torch.load(out), strict=True):
        expected = context_gradients.of(case._replace(compiled=False), None)
        assert found.keys() == expected.keys()
        for name, whole in expected.items():
            scale = max(1e-3, float(whole.abs().max()))
            off = float((found[name] - whole).abs().max())
            assert off <= 10 * TOLERANCE * scale, (case, name, off / scale)
