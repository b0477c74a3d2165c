"""A measurement as a table, and as files: JSON for programs, markdown for people."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_core.formats.atomic import atomic_file, check_new_file


@dataclass(frozen=True)
class Table:
    """Cells as text, the first column to the left; ``notes`` stand below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


def origin(result: dict[str, Any]) -> str:
    """Where and when a result was measured: device, date, versions."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    threads = "" if result["threads"] is None else f", {result['threads']} threads"
    copied = result.get("copy_bytes_per_second")
    copy = "" if copied is None else f", a copy moves {copied / 1e9:,.0f} GB/s"
    return f"{result['device']}{threads}{copy}; {result['date']}; {versions}"


def markdown(table: Table) -> str:
    """The table with its title as a heading."""
    lines = [f"# {table.title}", "", _line(table.columns)]
    lines.append(_line(["---"] + ["---:"] * (len(table.columns) - 1)))
    lines += [_line(row) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def refuse_existing(folder: Path, name: str, device: str, force: bool) -> list[Path]:
    """NAME-DEVICE.json and .md in the folder; SupraError if they exist, unless ``force``."""
    paths = [folder / f"{name}-{_slug(device)}{suffix}" for suffix in (".json", ".md")]
    for path in paths:
        check_new_file(path, force)
    return paths


def write(folder: Path, name: str, result: dict[str, Any], table: Table, force: bool) -> list[Path]:
    """Both files of a result; raises as :func:`refuse_existing`."""
    paths = refuse_existing(folder, name, result["device"], force)
    texts = dict(zip(paths, (json.dumps(result, indent=2) + "\n", markdown(table)), strict=True))
    for path, text in texts.items():
        with atomic_file(path, replace=force) as partial:
            partial.write_text(text, encoding="utf-8")
    return list(texts)


def milliseconds(seconds: float | None) -> str:
    """With as many digits as are worth reading; a dash for what was not measured."""
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:,.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
