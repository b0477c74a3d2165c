"""Weights from one floating-point type to another, checked while they are read."""

from __future__ import annotations

import numpy as np

from supra_core.errors import SupraError
from supra_core.formats.finite import is_finite
from supra_core.tensors import Array, LazyTensor


def converted(name: str, tensor: LazyTensor, dtype: np.dtype[np.generic]) -> LazyTensor:
    """``tensor`` in another type; reading raises if numbers leave that type's range."""
    if tensor.dtype == dtype:
        return tensor

    def read() -> Array:
        array = tensor.read()
        with np.errstate(over="ignore"):
            result = array.astype(dtype)
        if dtype == np.float16 and not _same_finiteness(array, result):
            raise SupraError(
                f"{name} holds numbers beyond float16's range (65504): use bfloat16 or float32"
            )
        return result

    return LazyTensor(tensor.shape, dtype, read)


def _same_finiteness(before: Array, after: Array) -> bool:
    if is_finite(after):
        return True
    return bool((np.isfinite(before) == np.isfinite(after)).all())
