"""Print a measurement, and write it to a folder if one is named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from supra_cli.shared.output import log, print_json, print_table

if TYPE_CHECKING:
    from supra_core.measure.tables import Table


def check(name: str, *, out: Path | None, force: bool, device: str = "auto") -> None:
    """Raise SupraError when the files that :func:`show` will write exist, unless ``force``.

    Call it before measuring.
    """
    if out is not None:
        from supra_core.measure.tables import refuse_existing
        from supra_torch.benchmark.operator import resolved_device
        from supra_torch.benchmark.timing import device_name

        refuse_existing(out, name, device_name(resolved_device(device)), force)


def show(
    name: str, result: dict[str, Any], table: Table, *, out: Path | None, force: bool,
    json_output: bool,
) -> None:  # fmt: skip
    """Print the result; with ``out`` also write NAME-DEVICE.json and .md there."""
    if json_output:
        print_json(result)
    else:
        print_table(table.rows, columns=table.columns, title=table.title)
        for note in table.notes:
            log(note)
    if out is not None:
        from supra_core.measure.tables import write

        for path in write(out, name, result, table, force):
            log(f"wrote {path}")
