"""A report from settings to its two files."""

from __future__ import annotations

import time
from typing import Any

from supra_cli.report_card.settings import ReportSettings
from supra_cli.shared.backends import require
from supra_cli.shared.record import origin
from supra_core.formats.atomic import atomic_file, check_new_file
from supra_core.progress import Progress


def write_report(settings: ReportSettings, progress: Progress) -> dict[str, Any]:
    """Measure, and write the page and the record beside it; returns the record.

    Raises :class:`~supra_core.errors.SupraError` before anything is measured when an output
    exists, an input cannot be read, or matplotlib is not installed.
    """
    from supra_cli.report_card.inputs import read_inputs
    from supra_cli.report_card.measure import measure
    from supra_cli.report_card.page import render
    from supra_cli.shared.output import json_text

    start = time.monotonic()
    for path in (settings.out, settings.record_path):
        check_new_file(path, settings.force)
    require("matplotlib", "drawing the report", extra="report")
    inputs = read_inputs(settings)
    measured = measure(settings, inputs, progress)
    record = {**origin(), **measured}
    record["seconds"] = round(time.monotonic() - start, 1)
    # First: a page can be drawn again, hours of measuring cannot.
    with atomic_file(settings.record_path, replace=settings.force) as beside:
        beside.write_text(json_text(record) + "\n", encoding="utf-8")
    with atomic_file(settings.out, replace=settings.force) as beside:
        beside.write_text(render(record), encoding="utf-8")
    return record
