"""Weights converted to another floating-point type, checked while they are read."""

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
        if dtype == np.float16 and not (
            is_finite(result) or (np.isfinite(array) == np.isfinite(result)).all()
        ):
            raise SupraError(
                f"{name} holds numbers beyond float16's range (65504): use bfloat16 or float32"
            )
        return result

    return LazyTensor(tensor.shape, dtype, read)
