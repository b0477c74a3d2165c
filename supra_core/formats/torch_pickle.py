"""PyTorch checkpoints (``.pt``, ``.bin``) read without torch and without running their code.

A checkpoint is a zip archive: ``data.pkl`` describes the structure, ``data/N`` hold the numbers,
stored uncompressed. The few globals that rebuild tensors and plain containers are functions of
this module; any other is refused before it is looked up, so a hostile pickle does nothing but
raise :class:`FormatError` (see :mod:`supra_core.formats.pickle_machine`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from supra_core.errors import FormatError
from supra_core.formats import pickle_machine
from supra_core.formats.inside import file_in, has_file
from supra_core.formats.mapping import read_range
from supra_core.formats.pickle_machine import CodeError, Described, Function, short
from supra_core.formats.safetensors import RANK, shard_files
from supra_core.formats.zip_records import Record, read_records
from supra_core.tensors import Array, LazyTensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

# Bytes of data.pkl.
PICKLE_BYTES = 64_000_000
# A view may repeat numbers by strides of 0; more than these it holds only where they are stored.
REPEATED = 2**20
# Bytes that a file's tensors may amount to: tied ones share a storage, so more than the file has.
SHARING, SHARING_BYTES = 4, 2**26

_STORAGE_TYPES: dict[str, np.dtype[np.generic]] = {
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


def read_file(path: str | Path) -> Any:
    """The checkpoint's nested structure, its tensors lazy; refuses what would run code."""
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist: check the path")
    try:
        return _Archive(path).load()
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error}): check the file") from None


def state_dict(path: str | Path) -> dict[str, LazyTensor]:
    """A checkpoint's weights: its entry ``state_dict``, or the whole when it is one itself."""
    loaded = read_file(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"{path} holds no state_dict: name a file with a model's weights")
    total = 0
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise FormatError(
                f"{path}: entry '{short(name)}' is not a tensor, so this is no state_dict"
            )
        total += math.prod(value.shape) * value.dtype.itemsize
    if total > SHARING * Path(path).stat().st_size + SHARING_BYTES:
        raise FormatError(
            f"{path}: its tensors amount to {total:,} bytes, many times the file: refused"
        )
    return dict(loaded)


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The weights of ``pytorch_model.bin``, or of all shards its index lists."""
    folder = Path(folder)
    if not has_file(folder, INDEX):
        return state_dict(file_in(folder, SINGLE))
    tensors: dict[str, LazyTensor] = {}
    for name, expected in shard_files(folder, INDEX).items():
        found = state_dict(folder / name)
        for tensor in expected:
            if tensor not in found:
                raise FormatError(f"{folder / name} lacks {tensor}, which {INDEX} places there")
            tensors[tensor] = found[tensor]
    return tensors


def holds_pickles(folder: Path) -> bool:
    """Whether :func:`read_folder` would find something."""
    return has_file(folder, INDEX) or has_file(folder, SINGLE)


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file; ``count`` is how many it holds."""

    path: Path
    offset: int
    count: int
    dtype: np.dtype[np.generic]


class _Archive:
    """One checkpoint's records, and the structure among them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path)
        pickles = [name for name in self.records if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise FormatError(f"{path}: not a PyTorch checkpoint (no single data.pkl inside)")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        order = self.records.get(self.prefix + "byteorder")
        if order is not None and self._content("byteorder", order) != b"little":
            raise FormatError(f"{self.path}: big-endian checkpoint, which is not supported")
        content = self._content("data.pkl", self.records[self.prefix + "data.pkl"])
        try:
            return pickle_machine.load(content, _Globals(self.path), self.storage)
        except FormatError:
            raise
        except CodeError as error:
            raise FormatError(
                f"{self.path}: refused, because its pickle would run code ({error}): get the "
                "weights as safetensors, or save the bare state_dict"
            ) from None
        except Exception as error:  # A damaged pickle raises whatever its opcodes run into.
            raise FormatError(
                f"{self.path}: its pickle is damaged ({error}): get the file again"
            ) from None

    def storage(self, pid: Any) -> _Storage:
        """What a persistent id means: ("storage", type, key, device, count)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise FormatError(f"{self.path}: unknown reference in its pickle: get the file again")
        _, kind, key, _device, count = pid
        record = self.records.get(f"{self.prefix}data/{key}") if isinstance(key, str) else None
        dtype = _STORAGE_TYPES.get(kind) if isinstance(kind, str) else None
        if record is None or dtype is None or type(count) is not int:
            raise FormatError(f"{self.path}: storage '{short(key)}' is missing: get the file again")
        if count < 0 or count * dtype.itemsize > record.size:
            raise FormatError(f"{self.path}: storage '{key}' is too short: get the file again")
        return _Storage(self.path, record.offset, count, dtype)

    def _content(self, name: str, record: Record) -> bytes:
        if record.size > PICKLE_BYTES:
            raise FormatError(f"{self.path}: {name} has more than {PICKLE_BYTES:,} bytes: refused")
        with self.path.open("rb") as file:
            file.seek(record.offset)
            content = file.read(record.size)
        if len(content) != record.size or zlib.crc32(content) != record.crc:
            raise FormatError(f"{self.path}: {name} is damaged: get the file again")
        return content


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
        if module == "torch" and (name in _STORAGE_TYPES or name in _DTYPE_NAMES):
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
        not isinstance(storage, _Storage)
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
    start = storage.offset + offset * storage.dtype.itemsize

    def read() -> Array:
        flat = read_range(storage.path, start, (span,), storage.dtype)
        if empty:
            return np.empty(extents, storage.dtype)
        byte_steps = tuple(step * storage.dtype.itemsize for step in steps)
        view = np.lib.stride_tricks.as_strided(flat, extents, byte_steps, writeable=False)
        return np.ascontiguousarray(view) if extents else view

    return LazyTensor(extents, storage.dtype, read)
