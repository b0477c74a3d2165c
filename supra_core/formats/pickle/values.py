"""What the globals of a PyTorch checkpoint's pickle mean: storages, and tensors that view them.

The few globals that rebuild tensors and plain containers are functions of this module; any other
is refused before it is looked up (see :mod:`supra_core.formats.pickle.machine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.mapping import read_range
from supra_core.formats.pickle import machine as pickle_machine
from supra_core.formats.pickle.machine import CodeError, Described, Function, short
from supra_core.formats.safetensors import RANK
from supra_core.tensors import Array, LazyTensor

# A view may repeat numbers by strides of 0; more than these it holds only where they are stored.
REPEATED = 2**20

STORAGE_TYPES: dict[str, np.dtype[np.generic]] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}

# Globals that are values, not calls: their name stands for them.
_DTYPE_NAMES = frozenset(
    ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")
)
_NUMBER_TYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


@dataclass
class Storage:
    """A run of ``count`` numbers in the file, from byte ``offset`` on.

    Where storages follow the pickle that names them, the offset is set when they are found.
    """

    path: Path
    offset: int
    count: int
    dtype: np.dtype[np.generic]


def load(path: Path, content: bytes | BinaryIO, reference: Callable[[Any], Any]) -> Any:
    """What a pickle in the file ``path`` holds; ``reference``: the storage of a persistent id.

    :class:`FormatError` for what would run code, is damaged, or beyond the machine's bounds.
    """
    try:
        return pickle_machine.load(content, _Globals(path), reference)
    except FormatError:
        raise
    except CodeError as error:
        raise FormatError(
            f"{path}: refused, because its pickle would run code ({error}): get the "
            "weights as safetensors, or save the bare state_dict"
        ) from None
    except Exception as error:  # A damaged pickle raises whatever its opcodes run into.
        raise FormatError(f"{path}: its pickle is damaged ({error}): get the file again") from None


class _NumberType(Described):
    """A numpy type of plain numbers, by its code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("a big-endian number")


class _Globals:
    """What a pickle's globals mean: types' names, and functions of this module."""

    def __init__(self, path: Path) -> None:
        self._functions = {name: Function(call) for name, call in _allowed_globals(path).items()}

    def __call__(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPE_NAMES:
            return name
        # Of a tensor on a GPU, as PyTorch before 1.6 writes it, in the second.
        if module in ("torch", "torch.cuda") and name in STORAGE_TYPES:
            return name
        return self._functions.get((module, name))


def _allowed_globals(path: Path) -> dict[tuple[str, str], Callable[..., Any]]:
    def rebuild_tensor(
        storage: Any, offset: Any, shape: Any, strides: Any, *_autograd: Any
    ) -> LazyTensor:
        return _strided(path, storage, offset, shape, strides)

    def rebuild_parameter(data: Any, *_autograd: Any) -> Any:
        return data

    def size(extents: Any = ()) -> tuple[Any, ...]:
        if not isinstance(extents, tuple | list):
            raise ValueError("a size of no extents")
        return tuple(extents)

    def device(kind: Any, index: Any = None) -> str:
        return short(kind) if index is None else f"{short(kind)}:{short(index)}"

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
            raise FormatError(f"{path}: unknown bytes in its pickle: save the bare state_dict")
        return text.encode("latin1")

    def number_type(name: Any, *_flags: Any) -> _NumberType:
        # Plain numbers only: numpy's other types can be given a state that reads as pointers.
        if not isinstance(name, str) or name not in _NUMBER_TYPES:
            raise FormatError(
                f"{path}: refused, because its pickle holds numpy type '{short(name)}'"
            )
        return _NumberType(name)

    def number(kind: Any, raw: Any = b"") -> Any:
        if not isinstance(kind, _NumberType) or not isinstance(raw, bytes):
            raise ValueError("a number of no type")
        dtype = np.dtype(kind.code).newbyteorder("<")
        if len(raw) != dtype.itemsize:
            raise ValueError("a number of another size than its type")
        return np.frombuffer(raw, dtype)[0].item()

    return {
        ("collections", "OrderedDict"): pickle_machine.ordered_dict,
        ("builtins", "set"): pickle_machine.set_of,
        ("__builtin__", "set"): pickle_machine.set_of,
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
        ("torch", "Size"): size,
        ("torch", "device"): device,
        # What metrics beside the weights are made of.
        ("_codecs", "encode"): encode,
        ("numpy", "dtype"): number_type,
        ("numpy.core.multiarray", "scalar"): number,
        ("numpy._core.multiarray", "scalar"): number,
    }


def _strided(path: Path, storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    """The view of ``storage`` that starts ``offset`` elements in; strides are in elements."""
    wrong = FormatError(f"{path}: a tensor is described wrongly in its pickle: get it again")
    if not all(
        isinstance(sizes, tuple | list) and len(sizes) <= RANK for sizes in (shape, strides)
    ):
        raise wrong
    extents, steps = tuple(shape), tuple(strides)
    numbers = (offset, *extents, *steps)
    if (
        not isinstance(storage, Storage)
        or len(extents) != len(steps)
        or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    ):
        raise wrong
    empty = 0 in extents
    span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(extents, steps, strict=True))
    if offset + span > storage.count:
        raise FormatError(f"{path}: a tensor reaches past its storage: get the file again")
    if math.prod(extents) > max(storage.count, REPEATED):
        raise FormatError(f"{path}: a tensor repeats its storage {extents} times over: refused")

    def read() -> Array:
        start = storage.offset + offset * storage.dtype.itemsize
        flat = read_range(storage.path, start, (span,), storage.dtype)
        if empty:
            return np.empty(extents, storage.dtype)
        byte_steps = tuple(step * storage.dtype.itemsize for step in steps)
        view = np.lib.stride_tricks.as_strided(flat, extents, byte_steps, writeable=False)
        return np.ascontiguousarray(view) if extents else view

    return LazyTensor(extents, storage.dtype, read)
