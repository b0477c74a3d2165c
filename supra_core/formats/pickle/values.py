"""What the globals of a PyTorch checkpoint's pickle mean: storages, and tensors that view them.

The few globals that rebuild tensors and plain containers are functions of this module; any other
is refused before it is looked up (see :mod:`supra_core.formats.pickle.machine`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.mapping import read_range
from supra_core.formats.pickle import machine as pickle_machine
from supra_core.formats.pickle.machine import CodeError, Described, Function, short
from supra_core.formats.safetensors import RANK
from supra_core.tensors import BFLOAT16, Array, LazyTensor

# A view may repeat numbers by strides of 0; more numbers than this only where they are stored.
REPEATED = 2**20

_STORAGE_TYPES: dict[str, np.dtype[np.generic]] = {
    "DoubleStorage": np.dtype("f8"), "FloatStorage": np.dtype("f4"), "HalfStorage": np.dtype("f2"),
    "BFloat16Storage": BFLOAT16, "LongStorage": np.dtype("i8"), "IntStorage": np.dtype("i4"),
    "ShortStorage": np.dtype("i2"), "CharStorage": np.dtype("i1"), "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}  # fmt: skip

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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what a damaged or hostile checkpoint leads to into a FormatError that names ``path``."""
    try:
        yield
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error}): check the file") from None
    except CodeError as error:
        raise FormatError(
            f"{path}: refused, because its pickle would run code ({error}): get the "
            "weights as safetensors, or save the bare state_dict"
        ) from None
    except Exception as error:  # A damaged pickle raises whatever its opcodes run into.
        raise FormatError(f"{path}: its pickle is damaged ({error}): get the file again") from None


def load(content: bytes | BinaryIO, reference: Callable[[Any], Any]) -> Any:
    """What a pickle holds; ``reference``: the storage of a persistent id.

    Raises as :func:`supra_core.formats.pickle.machine.load`; see :func:`reading`.
    """
    return pickle_machine.load(content, _meaning, reference)


def stated_storage(pid: Any, parts: int) -> tuple[str, int, np.dtype[np.generic], Any]:
    """Key, count and type of a persistent id, and its last part.

    ("storage", type, key, device, count, ...) of ``parts`` parts; ValueError for any other.
    """
    if type(pid) is tuple and len(pid) == parts and pid[0] == "storage":
        kind, key, count = pid[1], pid[2], pid[4]
        dtype = _STORAGE_TYPES.get(kind) if isinstance(kind, str) else None
        if dtype is not None and isinstance(key, str) and type(count) is int and count >= 0:
            return key, count, dtype, pid[-1]
    raise ValueError("unknown reference in its pickle")


class _NumberType(Described):
    """A numpy type of plain numbers, by its code."""

    def __init__(self, code: str) -> None:
        self.code = code

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise ValueError("a big-endian number")


def _meaning(module: str, name: str) -> Any:
    """A global as a value or a function; None for one that is refused."""
    if module == "torch" and name in _DTYPE_NAMES:
        return name
    # PyTorch before 1.6 names storages on a GPU in the second.
    if module in ("torch", "torch.cuda") and name in _STORAGE_TYPES:
        return name
    return _FUNCTIONS.get((module, name))


def _device(kind: Any, index: Any = None) -> str:
    return short(kind) if index is None else f"{short(kind)}:{short(index)}"


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise ValueError("bytes in an unknown encoding")
    return text.encode("latin1")


def _number_type(name: Any, *_flags: Any) -> _NumberType:
    # Plain numbers only: numpy's other types can be given a state that reads as pointers.
    if not isinstance(name, str) or name not in _NUMBER_TYPES:
        raise CodeError(f"numpy type '{short(name)}'")
    return _NumberType(name)


def _number(kind: Any, raw: Any = b"") -> Any:
    if not isinstance(kind, _NumberType) or not isinstance(raw, bytes):
        raise ValueError("a number without a type")
    dtype = np.dtype(kind.code).newbyteorder("<")
    if len(raw) != dtype.itemsize:
        raise ValueError("a number that does not have the size of its type")
    return np.frombuffer(raw, dtype)[0].item()


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_autograd: Any) -> LazyTensor:
    """The view of ``storage`` that starts ``offset`` elements in; strides are in elements."""
    listed = all(isinstance(x, tuple | list) and len(x) <= RANK for x in (shape, strides))
    extents, steps = (tuple(shape), tuple(strides)) if listed else ((), ())
    if not (
        listed
        and isinstance(storage, Storage)
        and len(extents) == len(steps)
        and all(type(n) is int and 0 <= n < 2**63 for n in (offset, *extents, *steps))
    ):
        raise ValueError("a tensor is described wrongly")
    empty = 0 in extents
    span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(extents, steps, strict=True))
    if offset + span > storage.count:
        raise ValueError("a tensor reaches past its storage")
    if math.prod(extents) > max(storage.count, REPEATED):
        raise ValueError(f"a tensor of shape {extents} repeats a storage of {storage.count}")

    def read() -> Array:
        if empty:
            return np.empty(extents, storage.dtype)
        start = storage.offset + offset * storage.dtype.itemsize
        flat = read_range(storage.path, start, (span,), storage.dtype)
        byte_steps = tuple(step * storage.dtype.itemsize for step in steps)
        view = np.lib.stride_tricks.as_strided(flat, extents, byte_steps, writeable=False)
        return np.ascontiguousarray(view) if extents else view

    return LazyTensor(extents, storage.dtype, read)


_FUNCTIONS: dict[tuple[str, str], Function] = {
    (module, name): Function(call)
    for module, name, call in (
        ("collections", "OrderedDict", pickle_machine.ordered_dict),
        ("builtins", "set", pickle_machine.set_of),
        ("__builtin__", "set", pickle_machine.set_of),
        ("torch._utils", "_rebuild_tensor", _tensor),
        ("torch._utils", "_rebuild_tensor_v2", _tensor),
        ("torch._utils", "_rebuild_parameter", lambda data, *_: data),
        ("torch._utils", "_rebuild_parameter_with_state", lambda data, *_: data),
        ("torch", "Size", lambda extents=(): tuple(pickle_machine.listed(extents))),
        ("torch", "device", _device),
        # What metrics beside the weights are made of.
        ("_codecs", "encode", _encode),
        ("numpy", "dtype", _number_type),
        ("numpy.core.multiarray", "scalar", _number),
        ("numpy._core.multiarray", "scalar", _number),
    )
}
