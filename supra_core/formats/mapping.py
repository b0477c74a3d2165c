"""Tensors as memory maps of a range of a file, mapped while they are in use."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from supra_core.errors import FormatError
from supra_core.tensors import Array, LazyTensor


def mapped(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> LazyTensor:
    """The tensor whose little-endian, row-major bytes begin ``offset`` bytes into ``path``."""
    return LazyTensor(shape, dtype, lambda: read_range(path, offset, shape, dtype))


def read_range(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[np.generic]
) -> Array:
    """A read-only map of the bytes; :class:`FormatError` if the file has become shorter."""
    count = math.prod(shape)
    if count == 0:
        return np.empty(shape, dtype)
    try:
        # One map for each tensor, not for the file: its memory is freed with the array.
        raw = np.memmap(path, np.uint8, "r", offset, (count * dtype.itemsize,))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} changed while it was open ({error}): start again") from None
    array = np.asarray(raw).view(dtype).reshape(shape)
    # torch and mlx need aligned data, which old headers do not guarantee.
    return np.require(array, requirements="A")
