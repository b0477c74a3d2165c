"""The record in a few lines for a terminal."""

from __future__ import annotations

from typing import Any

from supra_cli.report_card.page import sections
from supra_cli.report_card.parts import Cell, Table

_MOST_ROWS = 12
# Tables that are long, and whose figure says more.
_LEFT_OUT = ("layers", "training", "positions", "recall")


def show(record: dict[str, Any]) -> None:
    """The short tables of the page on stdout, and on stderr what could not be measured."""
    from supra_cli.shared.output import log, print_table

    for section in sections(record):
        for note in section.notes:
            log(f"{section.title}: {note}")
        if section.key in _LEFT_OUT:
            continue
        for table in section.content.tables:
            print_table(_rows(table), columns=table.columns, title=table.caption or section.title)


def _rows(table: Table) -> list[list[str]]:
    return [
        [cell.text if isinstance(cell, Cell) else cell for cell in row]
        for row in table.rows[:_MOST_ROWS]
    ]
