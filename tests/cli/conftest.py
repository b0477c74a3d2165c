"""The command line, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def supra() -> Run:
    """Runs the command in a process of its own, as a user would."""

    def run(*arguments: str | Path, input: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "supra_cli", *map(str, arguments)],
            capture_output=True, text=True, input=input, check=False,
        )  # fmt: skip

    return run
