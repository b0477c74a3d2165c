"""GGUF models of several files, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError
from supra_core.formats.gguf.header import Stored, read_header
from supra_core.formats.inside import file_in, files_in

SUFFIX = ".gguf"

_PART = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
# Parts of one model; gguf-split names no more.
_MOST_PARTS = 10_000


def model_files(folder: Path) -> list[Path]:
    """The GGUF models in ``folder``, a model in parts by its first part that is there."""
    models: dict[str, Path] = {}
    for path in files_in(folder, "*"):
        if path.suffix.lower() == SUFFIX:
            models.setdefault(_named(path.name, 1) or path.name, path)
    return list(models.values())


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """Metadata by key and tensors by name, of one file or of all parts.

    :class:`FormatError` if a part is missing or another model's, or ``path`` is not the first.
    """
    metadata, stored = read_header(path)
    count = metadata.get(_COUNT, 1)
    if count in (0, 1):
        return metadata, stored
    if type(count) is not int or not 1 < count <= _MOST_PARTS:
        raise FormatError(f"{path}: {_COUNT} must count the parts, not be {count!r}: get it again")
    first = _part(path, 1, count)
    if metadata.get(_NUMBER) != 0 or first != path:
        raise FormatError(f"{path} is a part of a split model: name its first part, {first}")
    for number in range(2, count + 1):
        part = _part(path, number, count)
        stated, more = read_header(part)
        if (stated.get(_NUMBER), stated.get(_COUNT)) != (number - 1, count):
            raise FormatError(
                f"{part} is not part {number} of {count} by its {_NUMBER} and {_COUNT}: get it "
                "again"
            )
        both = sorted(stored.keys() & more.keys())
        if both:
            raise FormatError(f"{part} holds {both[0]}, as an earlier part does: get it again")
        stored |= more
    if metadata.get(_TENSORS, len(stored)) != len(stored):
        raise FormatError(
            f"{path}: {_TENSORS} is {metadata[_TENSORS]}, but its parts hold {len(stored)} "
            "tensors: get the files again"
        )
    return metadata, stored


def _named(name: str, number: int) -> str | None:
    """The name of part ``number`` of the same model; None unless ``name`` is a part's."""
    found = _PART.fullmatch(name)
    return None if found is None else f"{found[1]}{number:05}{found[3]}{found[4]}{found[5]}"


def _part(path: Path, number: int, count: int) -> Path:
    """Part ``number`` of the model that ``path`` is a part of; it exists."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found[4]) != count:
        raise FormatError(
            f"{path} is one of {count} parts of a split model: name its first part "
            f"NAME-00001-of-{count:05}.gguf as gguf-split does, and the others likewise"
        )
    part = file_in(path.parent, str(_named(path.name, number)))
    if not os.path.isfile(part):
        raise FormatError(f"{part} is missing, part {number} of {count} of the model: get it")
    return part
