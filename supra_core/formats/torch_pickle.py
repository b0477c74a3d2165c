"""PyTorch checkpoints (``.pt``, ``.bin``) read without torch and without running their code.

A checkpoint is a zip archive: ``data.pkl`` describes the structure, ``data/N`` hold the numbers,
stored uncompressed. The unpickler here knows the few globals that rebuild tensors and plain
containers, all of them replaced by functions of this module; any other global is refused before
it is looked up, so a hostile pickle does nothing but raise :class:`FormatError`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.mapping import read_range
from supra_core.formats.safetensors import shard_files
from supra_core.tensors import Array, LazyTensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

_LOCAL_HEADER = 30  # Bytes of a zip entry's local header before its name.

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
        with zipfile.ZipFile(path) as archive:
            return _Archive(path, archive).load()
    except zipfile.BadZipFile:
        raise FormatError(
            f"{path}: truncated, or not a checkpoint of PyTorch 1.6 or later: get the file again, "
            "or save it again with a current PyTorch"
        ) from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error}): check the file") from None


def state_dict(path: str | Path) -> dict[str, LazyTensor]:
    """A checkpoint's weights: its entry ``state_dict``, or the whole when it is one itself."""
    loaded = read_file(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"{path} holds no state_dict: name a file with a model's weights")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise FormatError(f"{path}: entry '{name}' is not a tensor, so this is no state_dict")
    return dict(loaded)


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The weights of ``pytorch_model.bin``, or of all shards its index lists."""
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        return state_dict(folder / SINGLE)
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
    return (folder / INDEX).is_file() or (folder / SINGLE).is_file()


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the file; ``count`` is how many it holds."""

    path: Path
    offset: int
    count: int
    dtype: np.dtype[np.generic]


class _Archive:
    """One checkpoint's zip, open while its structure is read."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self.archive = archive
        self.entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.entries if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise FormatError(f"{path}: not a PyTorch checkpoint (no single data.pkl inside)")
        self.prefix = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        order = self.entries.get(self.prefix + "byteorder")
        if order is not None and self.archive.read(order) != b"little":
            raise FormatError(f"{self.path}: big-endian checkpoint, which is not supported")
        stream = io.BytesIO(self.archive.read(self.prefix + "data.pkl"))
        try:
            return _Unpickler(stream, self).load()
        except FormatError:
            raise
        except Exception as error:  # A damaged pickle raises whatever its opcodes run into.
            raise FormatError(
                f"{self.path}: its pickle is damaged ({error}): get the file again"
            ) from None

    def storage(self, kind: object, key: object, count: object) -> _Storage:
        info = self.entries.get(f"{self.prefix}data/{key}")
        dtype = _STORAGE_TYPES.get(kind) if isinstance(kind, str) else None
        if info is None or dtype is None or not isinstance(count, int):
            raise FormatError(f"{self.path}: storage '{key}' is missing: get the file again")
        if info.compress_type != zipfile.ZIP_STORED:
            raise FormatError(f"{self.path}: compressed storages are not supported: save it again")
        if count < 0 or count * dtype.itemsize > info.file_size:
            raise FormatError(f"{self.path}: storage '{key}' is too short: get the file again")
        return _Storage(self.path, self._data_offset(info), count, dtype)

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        with self.path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
        if header[:4] != b"PK\x03\x04":
            raise FormatError(f"{self.path}: damaged zip entry {info.filename}: get it again")
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        offset = info.header_offset + _LOCAL_HEADER + name + extra
        if offset + info.file_size > self.path.stat().st_size:
            raise FormatError(f"{self.path}: truncated at {info.filename}: get the file again")
        return offset


class _Unpickler(pickle.Unpickler):
    """Resolves a pickle's globals to functions of this module, and nothing else."""

    def __init__(self, stream: io.BytesIO, archive: _Archive) -> None:
        super().__init__(stream)
        self._archive = archive
        # New functions for each file: a pickle that sets attributes on them changes nothing else.
        self._globals = _allowed_globals(archive.path)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name in _STORAGE_TYPES or name in _DTYPE_NAMES):
            return name
        if (module, name) in self._globals:
            return self._globals[module, name]
        raise FormatError(
            f"{self._archive.path}: refused, because its pickle would run code ({module}.{name}): "
            "get the weights as safetensors, or save the bare state_dict"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise FormatError(f"{self._archive.path}: unknown reference in its pickle: {pid!r}")
        _, kind, key, _device, count = pid
        return self._archive.storage(kind, key, count)


def _allowed_globals(path: Path) -> dict[tuple[str, str], Callable[..., Any]]:
    def rebuild_tensor(
        storage: Any, offset: Any, shape: Any, strides: Any, *_autograd: Any
    ) -> LazyTensor:
        return _strided(path, storage, offset, shape, strides)

    def rebuild_parameter(data: Any, *_autograd: Any) -> Any:
        return data

    def size(extents: Any = ()) -> tuple[Any, ...]:
        return tuple(extents)

    def device(kind: Any, index: Any = None) -> str:
        return str(kind) if index is None else f"{kind}:{index}"

    def encode(text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise FormatError(f"{path}: unknown bytes in its pickle: save the bare state_dict")
        return text.encode("latin1")

    def number_type(name: Any, *_flags: Any) -> np.dtype[np.generic]:
        # Plain numbers only: numpy's other types can be given a state that reads as pointers.
        if name not in _NUMBER_TYPES:
            raise FormatError(f"{path}: refused, because its pickle holds numpy type '{name}'")
        return np.dtype(str(name))

    def number(kind: Any, raw: Any = b"") -> Any:
        return np.frombuffer(raw, kind, 1)[0].item()

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("builtins", "set"): set,
        ("__builtin__", "set"): set,
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
    extents, steps = tuple(shape), tuple(strides)
    numbers = (offset, *extents, *steps)
    if (
        not isinstance(storage, _Storage)
        or len(extents) != len(steps)
        or not all(isinstance(number, int) and number >= 0 for number in numbers)
    ):
        raise FormatError(f"{path}: a tensor is described wrongly in its pickle: get it again")
    empty = 0 in extents
    span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(extents, steps, strict=True))
    if offset + span > storage.count:
        raise FormatError(f"{path}: a tensor reaches past its storage: get the file again")
    start = storage.offset + offset * storage.dtype.itemsize

    def read() -> Array:
        flat = read_range(storage.path, start, (span,), storage.dtype)
        if empty:
            return np.empty(extents, storage.dtype)
        byte_steps = tuple(step * storage.dtype.itemsize for step in steps)
        view = np.lib.stride_tricks.as_strided(flat, extents, byte_steps, writeable=False)
        return np.ascontiguousarray(view) if extents else view

    return LazyTensor(extents, storage.dtype, read)
