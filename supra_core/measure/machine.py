"""What a measurement must say about where and when it was taken."""

from __future__ import annotations

import platform
import time
from importlib import metadata
from pathlib import Path


def processor_name() -> str:
    """The processor as its maker calls it, or at least its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python, of supra, and of those of ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in ("supra-lm", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    """The date in UTC, year first."""
    return time.strftime("%Y-%m-%d", time.gmtime())
