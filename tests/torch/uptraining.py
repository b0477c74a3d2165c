"""Short runs of a tiny model, and what they wrote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supra_core.artifact import folder as artifact

if TYPE_CHECKING:
    from supra_torch.recipes.config import UptrainConfig

SETTINGS = {
    "tokens": "1280", "sequence_length": "32", "batch_tokens": "64", "checkpoint_every": "3",
    "precision": "float32", "linearize.window": "8", "epochs": "100",
    # Calibrated, so small a model has little left to learn.
    "calibrate": "none",
}  # fmt: skip

EVEN_STAGES = {
    "stages.0.share": "1.0", "stages.0.cut": "1", "stages.0.batch_share": "1.0",
    "stages.1.share": "1.0", "stages.1.cut": "1", "stages.1.batch_share": "1.0",
    "stages.1.freeze": "[]",
}  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    """The run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged_losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run) if "loss" in record]


def complete_lines(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def weights_in(folder: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in artifact.read(folder).tensors.items()}


def run_in_process(settings: UptrainConfig, run: Path, pause: float = 0.0) -> Any:
    """The run in a process of its own, on one thread; ``pause`` seconds after every step."""
    return subprocess.Popen(
        [sys.executable, "-c", script(pause), *arguments(settings, run)], env=environment()
    )


def run_in_processes(
    settings: UptrainConfig, run: Path, count: int, pause: float = 0.0, before: str = ""
) -> Any:
    """The same in ``count`` processes by torchrun, which is returned; ``before`` comes first."""
    file = run.with_name(f"{run.name}.py")
    file.write_text(before + script(pause))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(file), *arguments(settings, run)], env=environment()
    )


def end_by(number: signal.Signals, process: Any, run: Path, after: int) -> int:
    """Send a signal when so many steps are logged; the exit code."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").is_file() and len(complete_lines(run)) >= after:
            break
        time.sleep(0.02)
    process.send_signal(number)
    code: int = process.wait()
    return code


def script(pause: float) -> str:
    return (
        "import os, sys, time, torch\n"
        "torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from supra_core.errors import Preempted\n"
        "from supra_torch.recipes.config import UptrainConfig\n"
        "from supra_torch.uptrain.run import uptrain\n"
        "try:\n"
        "    uptrain(UptrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]),\n"
        f"            progress=lambda *a, **k: time.sleep({pause}))\n"
        "    code = 0\n"
        "except Preempted:\n"
        "    code = 75\n"
        # As the command line: what is left of a group may abort a process that takes itself down.
        "if 'TORCHELASTIC_RUN_ID' in os.environ:\n"
        "    sys.stdout.flush()\n"
        "    os._exit(code)\n"
        "sys.exit(code)\n"
    )


def arguments(settings: UptrainConfig, run: Path) -> list[str]:
    return [settings.model_dump_json(), str(run)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
