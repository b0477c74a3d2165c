"""Safetensors of torch.distributed.checkpoint, where each process writes parts of the tensors.

``DCP_SHARDING_INFO`` in a file's metadata says which part of a tensor the file holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.errors import FormatError
from supra_core.formats import safetensors
from supra_core.formats.inside import files_in
from supra_core.formats.jsonfile import parse
from supra_core.tensors import Array, LazyTensor

_PATTERN = "shard-*.safetensors"
_SHARDING, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class _Part:
    """The box of a tensor that begins at ``offsets``."""

    offsets: tuple[int, ...]
    tensor: LazyTensor

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.offsets, self.tensor.shape, strict=True))


def holds_shards(folder: Path) -> bool:
    """Whether :func:`read_folder` would find something."""
    return any(folder.glob(_PATTERN))


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder, joined from its parts when it is read.

    FormatError when a file is damaged, or the parts of a tensor leave a gap or overlap.
    """
    parts: dict[str, list[_Part]] = {}
    for file in files_in(folder, _PATTERN):
        for name, part in _parts(file):
            parts.setdefault(name, []).append(part)
    return {name: _joined(folder, name, found) for name, found in parts.items()}


def _parts(file: Path) -> Iterator[tuple[str, _Part]]:
    tensors = safetensors.read_file(file)
    stated = safetensors.metadata(file).get(_SHARDING)
    try:
        offsets: dict[str, Any] = {} if stated is None else parse(stated)
        if not isinstance(offsets, dict):
            raise ValueError("a tensor")
        for name, tensor in tensors.items():
            begin = offsets[name][_OFFSETS] if offsets else [0] * len(tensor.shape)
            if len(begin) != len(tensor.shape) or any(type(x) is not int or x < 0 for x in begin):
                raise ValueError(name)
            yield name, _Part(tuple(begin), tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise FormatError(
            f"{file}: the metadata {_SHARDING} do not say which part of {error} it holds: get the "
            "file again"
        ) from None


def _joined(folder: Path, name: str, parts: list[_Part]) -> LazyTensor:
    # Parts of different ranks cannot be compared.
    ranks = {len(part.offsets) for part in parts}
    ends = (part.end for part in parts) if len(ranks) == 1 else ()
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    dtypes = {part.tensor.dtype for part in parts}
    parts = sorted(parts, key=lambda part: part.offsets)
    # Boxes that do not overlap and together have the volume of the whole leave no gap.
    volume = sum(math.prod(part.tensor.shape) for part in parts)
    if len(ranks) > 1 or len(dtypes) > 1 or volume != math.prod(shape) or _overlap(parts):
        raise FormatError(
            f"{folder}: the parts of {name} do not make one tensor: a file is missing or belongs "
            "to another checkpoint"
        )
    if len(parts) == 1:
        return parts[0].tensor
    dtype = dtypes.pop()

    def rows(start: int, stop: int) -> Array:
        out = np.empty((stop - start, *shape[1:]), dtype)
        for part in parts:
            first, last = max(start, part.offsets[0]), min(stop, part.end[0])
            if first < last:
                others = zip(part.offsets[1:], part.end[1:], strict=True)
                place = (slice(first - start, last - start), *(slice(a, b) for a, b in others))
                out[place] = part.tensor.rows(first - part.offsets[0], last - part.offsets[0])
        return out

    return LazyTensor(shape, dtype, lambda: rows(0, shape[0]), rows)


def _overlap(parts: list[_Part]) -> bool:
    """Whether two boxes share an element; parts are few, one a process."""
    return any(
        all(
            a < d and c < b
            for a, b, c, d in zip(one.offsets, one.end, two.offsets, two.end, strict=True)
        )
        for index, one in enumerate(parts)
        for two in parts[index + 1 :]
    )
