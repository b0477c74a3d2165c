"""JSON files that hold one object, read with an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError


def read_object(path: Path) -> dict[str, Any]:
    """The object in ``path``; :class:`FormatError` if it is absent or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}): get the file again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} must hold a JSON object: get the file again")
    return value


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
