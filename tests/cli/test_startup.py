"""The command starts quickly, and works in a process of its own."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
HEAVY = ("torch", "mlx", "transformers", "numpy", "pydantic", "rich", "matplotlib", "jinja2")


def test_help_is_quick(supra: Run) -> None:
    seconds = [math.inf]
    # Neighbours on the same core slow it down by half: the best of several counts.
    while min(seconds) >= 0.3 and len(seconds) <= 20:
        before = os.times()
        done = supra("--help")
        after = os.times()
        # The processor's time: what the clock shows depends on what else the machine does.
        seconds.append(
            after.children_user
            - before.children_user
            + after.children_system
            - before.children_system
        )
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 0.3
    for command in ("convert", "verify", "uptrain", "eval", "report", "generate", "chat", "demo"):
        assert command in done.stdout


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom supra_cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_errors_go_to_stderr(supra: Run, tmp_path: Path) -> None:
    done = supra("inspect", tmp_path / "absent", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("supra: error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_a_training_run_cleanly(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "supra_cli", "uptrain", str(tiny_transformer),
            "--data", str(text_file), "--out", str(run), "--set", "tokens=1000000",
            "--set", "sequence_length=32", "--set", "batch_tokens=64", "--set", "epochs=1e9",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and '"loss"' in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list((run / "checkpoints").glob("step_*/state.json"))
