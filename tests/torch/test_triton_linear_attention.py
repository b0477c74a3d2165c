"""The Triton kernel: interpreted against float64, compiled ahead of time for real GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

ROOT = Path(__file__).resolve().parents[2]


def _interpreted(*arguments: str) -> None:
    path = os.pathsep.join(str(ROOT / part) for part in (".", "backends", "cli"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch.triton_scan_cases", *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("passed ")


def test_interpreted_kernel_is_the_definition() -> None:
    _interpreted()


@pytest.mark.slow
def test_interpreted_kernel_is_the_definition_in_more_shapes() -> None:
    _interpreted("--all")


@pytest.mark.parametrize("role", ["output", "dq", "dk", "dv"])
@pytest.mark.parametrize("capability", [80, 90])
def test_smollm2_layer_compiles_for_a_gpu(role: str, capability: int) -> None:
    from supra_torch.benchmark.compilation import Case, compile_case, complaints

    for masked in (False, True):
        case = Case("scan", role, True, "bf16", 64, 64, capability, masked=masked, packed=masked)
        found = compile_case(case)
        assert complaints(case, found) == []
        assert 0 < found.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_every_row_of_the_table_compiles(capability: int) -> None:
    from supra_torch.benchmark.compilation import complaints
    from supra_torch.benchmark.resources import all_cases, compiled

    rows = compiled(list(all_cases([capability]))).items()
    wrong = [(case, complaints(case, found)) for case, found in rows if complaints(case, found)]
    assert wrong == []


def test_a_cpu_tensor_is_refused_with_a_remedy() -> None:
    from supra_torch.ops import linear_attention

    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="needs CUDA tensors.*use implementation='chunked'"):
        linear_attention(x, x, x, torch.ones(1), implementation="triton")


def test_segments_fill_the_chip() -> None:
    from supra_torch.ops.triton_table import segments_for

    assert segments_for(512, 16384, 64, 132) == (1, 16384)  # full already
    assert segments_for(64, 16384, 64, 132) == (4, 4096)
    count, length = segments_for(1, 100_001, 64, 132)
    assert count <= 16
    assert (count - 1) * length < 100_001 <= count * length
    assert segments_for(1, 300, 64, 132)[0] == 1  # too short to cut


def test_an_older_gpu_is_refused() -> None:
    from supra_torch.ops.triton_table import tiles_for

    with pytest.raises(ValueError, match="compute capability 7.5"):
        tiles_for(75, 2, 64, 64)
    assert tiles_for(89, 2, 64, 64) == tiles_for(80, 2, 64, 64)
