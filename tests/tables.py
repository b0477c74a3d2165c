"""Tables of cases: which rows run in the fast set."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def thinned(table: Iterable[Any], fast: Container[Any]) -> list[Any]:
    """All rows; those not in ``fast``, which repeat a fault that one in it shows, are slow."""
    return [row if row in fast else pytest.param(row, marks=pytest.mark.slow) for row in table]
