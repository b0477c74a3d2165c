"""What a step may combine, in two processes and in one: the same gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from supra_torch.distributed.processes import Processes  # noqa: E402
from tests.torch import sharded_gradients  # noqa: E402
from tests.torch.uptraining import environment  # noqa: E402

# Of a model's largest gradient: sums of some hundred products in another order, each rounded to
# float32; to bfloat16, each product's operands.
TOLERANCE = {"float32": 2e-6, "bf16": 2**-7}


@pytest.mark.parametrize("together", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_two_processes_have_ones_gradients(together: int, tmp_path: Path) -> None:
    """Sharded over both, or whole in each."""
    store, out = tmp_path / "store", tmp_path / "gradients.pt"
    command = [sys.executable, "-m", sharded_gradients.__name__]
    both = [
        subprocess.Popen(
            [*command, str(rank), "2", str(together), str(store), str(out)], env=environment()
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    alone = Processes(0, 1, torch.device("cpu"))
    for case, found in zip(sharded_gradients.CASES, torch.load(out), strict=True):
        expected = sharded_gradients.of(case, alone)
        assert found.keys() == expected.keys()
        assert len(found) > 4
        largest = max(gradient.abs().max() for gradient in expected.values())
        for name, gradient in expected.items():
            off = (found[name] - gradient).abs().max()
            assert off <= TOLERANCE[case.precision] * largest, (case, name)
