"""What makes a figure traceable: the command, the versions, the machine and the date."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from supra_core.formats.atomic import atomic_file


def origin() -> dict[str, Any]:
    """How and where this process came to its figures."""
    from supra_cli.doctor import machine

    return {
        "command": shlex.join(["supra", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """``record`` with its :func:`origin` as a JSON file, written whole or not."""
    from supra_cli.output import json_text

    with atomic_file(path) as beside:
        beside.write_text(json_text({**origin(), **record}) + "\n", encoding="utf-8")
