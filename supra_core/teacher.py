"""The transformer that a model was made from, where it is still on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from supra_core.errors import SupraError
from supra_core.formats.jsonfile import read_object
from supra_core.sources import RUN_FILE, open_source


def find_teacher(model: str | Path) -> str | None:
    """The teacher an uptraining run names, or the source an artifact states; None if unknown."""
    folder = Path(model)
    for run in (folder, folder.parent):
        if (run / RUN_FILE).is_file():
            return _of_run(read_object(run / RUN_FILE))
    stated = open_source(model).spec.provenance.source
    # A source's name alone is kept, so that it is looked for here and beside the model.
    return _first_transformer([stated, str(folder.parent / stated)]) if stated else None


def _of_run(record: dict[str, Any]) -> str | None:
    named = record.get("teacher")
    if not isinstance(named, str) or not Path(named).exists():
        return None
    # A run may learn from the transformer inside a freshly converted model.
    return named if _is_transformer(named) else find_teacher(named)


def _first_transformer(places: list[str]) -> str | None:
    return next(
        (place for place in places if Path(place).exists() and _is_transformer(place)), None
    )


def _is_transformer(place: str) -> bool:
    try:
        return open_source(place).spec.is_transformer
    except SupraError:
        return False
