"""A run that is killed at any moment, by any means, goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

_ROOT = Path(__file__).resolve().parents[2]
_CONFIG = """
model = "{model}"
data = "{text}"
tokens = 10240
sequence_length = 32
batch_tokens = 128
epochs = 100
checkpoint_every = 2
evaluate_every = 5
precision = "float32"
calibrate_tokens = 1024
[linearize]
preset = "windowed"
window = 8
[[stages]]
kind = "transfer"
share = 0.25
learning_rate = 1e-3
new_learning_rate = 1e-2
[[stages]]
kind = "distill"
share = 0.25
learning_rate = 3e-4
new_learning_rate = 1e-3
[[stages]]
kind = "uptrain"
share = 0.5
learning_rate = 3e-4
new_learning_rate = 0.0
lora_rank = 2
"""
_MAIN = "import sys; from tests.torch.storm import main; main(sys.argv[1])"
_TMPFS = ("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs")


@pytest.fixture(scope="module")
def config(
    tiny_transformer: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """80 steps in three stages, the last of adapters."""
    file = tmp_path_factory.mktemp("config") / "tiny.toml"
    file.write_text(_CONFIG.format(model=tiny_transformer, text=text_file))
    return file


def _storms(config: Path, folder: Path, **instructions: object) -> str:
    """What the storms print; on a small disk of their own, or with files that may not grow."""
    disk, logs = folder / "disk", folder / "logs"
    disk.mkdir()
    logs.mkdir()
    mount = ["unshare", "--user", "--mount", "--map-root-user"]
    probe = [*mount, *_TMPFS, str(disk)]
    is_own = shutil.which("unshare") is not None and not subprocess.run(probe).returncode
    plan = folder / "plan.json"
    stated = {"config": str(config), "disk": str(disk), "logs": str(logs), "is_own": is_own}
    plan.write_text(json.dumps(stated | instructions))
    command = [sys.executable, "-c", _MAIN, str(plan)]
    if is_own:
        both = f"{shlex.join([*_TMPFS, str(disk)])} && exec {shlex.join(command)}"
        command = [*mount, "sh", "-c", both]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("count", "sharing"), [(1, 1), (2, 1), (2, 2)])
def test_twenty_kills_change_nothing(
    config: Path, tmp_path: Path, count: int, sharing: int
) -> None:
    file = tmp_path / "storm.toml"
    file.write_text(f"context_parallel = {sharing}\n" + config.read_text())
    _storms(file, tmp_path, storms=[([count], 20, count)], tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize(("reduce_dtype", "tolerance"), [("float64", 0.0), ("float32", 2e-5)])
def test_every_start_may_have_another_number_of_processes(
    config: Path, tmp_path: Path, reduce_dtype: str, tolerance: float
) -> None:
    # In float32 sums are of other parts each time, and AdamW divides by the root of small squares:
    # up to 5e-6 of a tensor's norm was seen after these 80 steps.
    file = tmp_path / "storm.toml"
    file.write_text(f'reduce_dtype = "{reduce_dtype}"\n' + config.read_text())
    _storms(file, tmp_path, storms=[([1, 2, 4], 20, 3)], tolerance=tolerance)
