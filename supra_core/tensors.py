"""Tensors that are read when they are needed, so that memory never holds a whole model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError

Array = npt.NDArray[np.generic]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# The types a model's weights may have, by the name users and configs give them.
DTYPES: dict[str, np.dtype[np.generic]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}


@dataclass(frozen=True)
class LazyTensor:
    """Shape and type now, numbers on :meth:`read`, which may return a read-only memory map.

    ``read_rows``: reads a range of the first axis, where that is cheaper than reading all of it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[], Array]
    read_rows: Callable[[int, int], Array] | None = None

    @staticmethod
    def of(array: Array) -> LazyTensor:
        """An array in memory as a lazy tensor."""
        return LazyTensor(tuple(array.shape), array.dtype, lambda: array)

    def rows(self, start: int, stop: int) -> Array:
        """The numbers of rows ``start`` to ``stop`` of the first axis."""
        if self.read_rows is not None:
            return self.read_rows(start, stop)
        return self.read()[start:stop]

    def astype(self, dtype: np.dtype[np.generic]) -> LazyTensor:
        """The same numbers in another type, converted when read."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: self.read().astype(dtype))

    def map(self, shape: tuple[int, ...], function: Callable[[Array], Array]) -> LazyTensor:
        """``function`` applied when read; it must yield ``shape`` in the same type."""
        return LazyTensor(shape, self.dtype, lambda: function(self.read()))


TensorSource = Mapping[str, LazyTensor]


def dtype_named(name: str) -> np.dtype[np.generic]:
    """The numpy type called ``name``; :class:`FormatError` lists the known names."""
    if name not in DTYPES:
        raise FormatError(f"unknown dtype '{name}': use one of {', '.join(DTYPES)}")
    return DTYPES[name]
