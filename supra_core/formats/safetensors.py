"""Safetensors files and folders, read as memory maps and written tensor by tensor.

The whole header is checked before anything is allocated: its length, its depth, repeated names,
types, products of extents, and that the tensors fill the file without gap or overlap. Tensors that
do not begin at a multiple of their type's size, as in old files, are copied when they are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.errors import FormatError
from supra_core.formats.atomic import flush_to_disk
from supra_core.formats.inside import file_in, has_file, open_weights, plain_name
from supra_core.formats.jsonfile import INDEX_BYTES, parse, read_object, unique, write_object
from supra_core.formats.mapping import mapped
from supra_core.tensors import BFLOAT16, LazyTensor, TensorSource

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bytes above which a folder is sharded, as the hub and transformers have it.
SHARD_BYTES = 5_000_000_000

# Bytes of a header, the format's own limit; it is JSON of three levels.
HEADER_BYTES = 100_000_000
_HEADER_DEPTH = 3
# Limits of one tensor: characters of its name, extents, numbers.
NAME_LENGTH = 1024
RANK = 32
_LARGEST = 2**63 - 1

# Called after each tensor with the bytes written so far and the bytes in all.
Progress = Callable[[int, int], None]

_TYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2"), "BF16": BFLOAT16,
    "I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
# Bytes that are written and hashed at the same time, so that both find them in the CPU's cache.
_PART = 1 << 22


def read_file(path: str | Path) -> dict[str, LazyTensor]:
    """Every tensor of one file; :class:`FormatError` if it is truncated or damaged."""
    path = Path(path)
    start, places, _ = _checked(path)
    return {
        name: mapped(path, start + begin, shape, dtype)
        for name, (begin, _, shape, dtype) in places.items()
    }


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, whose header is checked."""
    return _checked(path)[2]


def read_folder(
    folder: str | Path,
    single: str = SINGLE,
    index: str = INDEX,
    read: Callable[[Path], dict[str, LazyTensor]] = read_file,
) -> dict[str, LazyTensor]:
    """The tensors of the file ``single``, or else of all shards that ``index`` lists.

    Each file is read by ``read``, that of safetensors unless another is given.
    """
    folder = Path(folder)
    # If both exist, transformers reads the single file.
    if has_file(folder, single):
        return read(folder / single)
    if not has_file(folder, index):
        raise FormatError(
            f"{folder} holds neither {single} nor {index}: name a folder with weights"
        )
    tensors: dict[str, LazyTensor] = {}
    for name, expected in shard_files(folder, index).items():
        if not os.path.isfile(folder / name):
            raise FormatError(f"{folder / name} is missing, though {index} lists it: get it again")
        found = read(folder / name)
        for tensor in expected:
            if tensor not in found:
                raise FormatError(f"{folder / name} lacks {tensor}, which {index} places there")
            tensors[tensor] = found[tensor]
    return tensors


def write_file(
    path: str | Path,
    tensors: TensorSource,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> str:
    """Write the tensors one after the other; memory holds about one of them at a time.

    ``progress`` is called with the size in bytes of each tensor written. Returns the file's
    SHA-256, in hexadecimal.
    """
    # Wide types first, as in the library: every tensor is then aligned to its own type.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise FormatError(f"{name}: type {tensor.dtype} cannot be stored in safetensors")
        end = offset + _bytes(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # Tensors begin at a multiple of eight bytes.
    path = Path(path)
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1, "digest") as beside:

        def put(content: bytes | memoryview) -> None:
            for first in range(0, len(content), _PART):
                part = content[first : first + _PART]
                hashed = beside.submit(digest.update, part)
                file.write(part)
                hashed.result()

        put(len(text).to_bytes(8, "little"))
        put(text)
        for name, tensor in ordered:
            put(_raw(name, tensor))
            if progress is not None:
                progress(_bytes(tensor))
    flush_to_disk(path)
    return digest.hexdigest()


def write_folder(
    folder: Path,
    tensors: TensorSource,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """``model.safetensors`` in ``folder``, or shards with an index above ``shard_bytes``.

    Returns the SHA-256 of each file of tensors by its name.
    """
    total = sum(_bytes(tensor) for tensor in tensors.values())
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return {SINGLE: write_file(folder / SINGLE, shards[0], metadata, advance)}
    weight_map: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[name] = write_file(folder / name, shard, metadata, advance)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_object(folder / INDEX, index)
    return digests


def shard_files(folder: Path, index_name: str) -> dict[str, list[str]]:
    """From an index, file name -> the tensors it must hold; names may not leave ``folder``."""
    index = folder / index_name
    weight_map = read_object(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: field weight_map is missing or empty: get the file again")
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not plain_name(name):
            raise FormatError(f"{index}: {tensor} points outside its folder ('{name}'): refused")
        files.setdefault(name, []).append(tensor)
    for name in files:
        file_in(folder, name)
    return files


Place = tuple[int, int, tuple[int, ...], np.dtype[np.generic]]


def _checked(path: Path) -> tuple[int, dict[str, Place], dict[str, str]]:
    """Where the tensors begin, the place of each, and the metadata."""
    start, size, header = _header(path)
    stated = header.pop("__metadata__", {})
    if not isinstance(stated, dict) or not all(isinstance(v, str) for v in stated.values()):
        raise _damaged(path, "its metadata are not text")
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    _check_filled(path, [(begin, end) for begin, end, _, _ in places.values()], size - start)
    return start, places, stated


def _header(path: Path) -> tuple[int, int, dict[str, Any]]:
    """Where the tensors begin, the file's size, and what stands before them."""
    try:
        with open_weights(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise _damaged(path, f"a header of {length} bytes in a file of {size}")
            if length > HEADER_BYTES:
                raise _damaged(path, f"a header of more than {HEADER_BYTES:,} bytes")
            content = file.read(length)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    try:
        # By the format, the header begins with its brace and may end with spaces.
        header = parse(content, depth=_HEADER_DEPTH, pairs=unique) if content[:1] == b"{" else None
    except ValueError as error:
        raise _damaged(path, f"its header: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return 8 + length, size, header


def _place(path: Path, name: str, entry: Any) -> Place:
    """Begin and end of one tensor behind the header, its shape and its type."""
    if len(name) > NAME_LENGTH:
        raise _damaged(path, f"a tensor's name has more than {NAME_LENGTH} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name} is described wrongly")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _sizes(shape, RANK) or not _sizes(offsets, 2) or len(offsets) != 2:
        raise _damaged(path, f"{name} has wrong extents or offsets")
    dtype = _TYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FormatError(
            f"{path}: {name} has type {entry['dtype']}, which is not supported: convert the "
            "weights to F32, F16 or BF16"
        )
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"{name} does not fit its place")
    return begin, end, tuple(shape), dtype


def _sizes(values: Any, most: int) -> bool:
    """Whether this is a list of up to ``most`` whole numbers that a file can hold."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value <= _LARGEST for value in values)
    )


def _check_filled(path: Path, ranges: list[tuple[int, int]], size: int) -> None:
    """Check that the ranges fill the file from the header to its end."""
    reached = 0
    for begin, end in sorted(ranges):
        if begin != reached:
            raise _damaged(path, "tensors overlap, or leave a gap")
        reached = end
    if reached != size:
        raise _damaged(path, f"{size} bytes where its tensors take {reached}")


def _damaged(path: Path, problem: object) -> FormatError:
    return FormatError(
        f"{path}: truncated or damaged safetensors file ({problem}): get the file again"
    )


def _bytes(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _raw(name: str, tensor: LazyTensor) -> memoryview:
    array = tensor.read()
    if array.dtype != tensor.dtype or array.shape != tensor.shape:
        raise FormatError(
            f"{name} was read as {array.dtype} {list(array.shape)}, "
            f"not as the announced {tensor.dtype} {list(tensor.shape)}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shards(tensors: TensorSource, shard_bytes: int) -> Iterator[dict[str, LazyTensor]]:
    shard: dict[str, LazyTensor] = {}
    held = 0
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if shard and held + size > shard_bytes:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += size
    yield shard
