"""Whether weights are finite: NaN or infinity in one of them makes every answer NaN."""

from __future__ import annotations

import numpy as np

from supra_core.errors import SupraError
from supra_core.tensors import BFLOAT16, Array, LazyTensor, TensorSource

# By type: an integer type of its size, the mask of all bits but the sign, the bits of infinity.
_BITS: dict[np.dtype[np.generic], tuple[type[np.unsignedinteger], int, int]] = {
    np.dtype(np.float64): (np.uint64, 2**63 - 1, 0x7FF << 52),
    np.dtype(np.float32): (np.uint32, 2**31 - 1, 0xFF << 23),
    np.dtype(np.float16): (np.uint16, 2**15 - 1, 0x1F << 10),
    BFLOAT16: (np.uint16, 2**15 - 1, 0xFF << 7),
}
# Numbers checked at a time, which fit the CPU's cache: ten times as fast as isfinite.
_BLOCK = 1 << 18


def is_finite(array: Array) -> bool:
    """Whether no number is NaN or infinite; integers never are."""
    if array.dtype not in _BITS:
        return True
    kind, mask, limit = _BITS[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1).view(kind)
    room = np.empty(min(_BLOCK, flat.size), kind)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        magnitudes = np.bitwise_and(part, kind(mask), out=room[: part.size])
        if magnitudes.max() >= limit:
            return False
    return True


class Watch:
    """Checks tensors whenever they are read; ``found``: the names of those not finite."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    @property
    def found(self) -> tuple[str, ...]:
        return tuple(self._found)

    def over(self, tensors: TensorSource) -> dict[str, LazyTensor]:
        """The same tensors, watched."""
        return {name: self._watched(name, tensor) for name, tensor in tensors.items()}

    def _watched(self, name: str, tensor: LazyTensor) -> LazyTensor:
        def look(array: Array) -> Array:
            if not is_finite(array):
                self._found[name] = None
            return array

        part = tensor.read_rows
        rows = None if part is None else lambda start, stop: look(part(start, stop))
        return LazyTensor(tensor.shape, tensor.dtype, lambda: look(tensor.read()), rows)


def first_not_finite(tensors: TensorSource) -> str | None:
    """The first tensor that holds NaN or infinity; all are read up to it."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor.read())), None)


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
