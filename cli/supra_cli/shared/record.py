"""What makes a figure traceable: the command, the versions, the machine and the date."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from supra_core.formats.atomic import atomic_file
from supra_core.measure.machine import processor_name


def origin() -> dict[str, Any]:
    """How and where this process came to its figures."""
    from supra_cli.shared.doctor import machine

    return {
        "command": shlex.join(["supra", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor_name(), "gpu": _gpu(), **machine()},
    }


def _gpu() -> str | None:
    """The GPU of the library that computed, which is imported by now; None for the processor."""
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    if mlx is not None and mlx.default_device() == mlx.gpu:
        return str(mlx.device_info().get("device_name", "GPU"))
    return None


def write_record(path: Path, record: dict[str, Any], *, replace: bool = True) -> None:
    """``record`` with its :func:`origin` as a JSON file, written as :func:`atomic_file` does."""
    from supra_cli.shared.output import json_text

    with atomic_file(path, replace=replace) as beside:
        beside.write_text(json_text({**origin(), **record}) + "\n", encoding="utf-8")
