"""PyTorch checkpoints (``.pt``, ``.bin``) read without torch and without running their code.

A checkpoint is a zip archive: ``data.pkl`` describes the structure, ``data/N`` hold the numbers,
uncompressed; before PyTorch 1.6 it was pickles followed by numbers
(:mod:`supra_core.formats.pickle.legacy`). A hostile pickle does nothing but raise
:class:`FormatError` (see :mod:`supra_core.formats.pickle.values`).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError
from supra_core.formats import safetensors
from supra_core.formats.inside import open_regular, open_weights
from supra_core.formats.pickle import legacy
from supra_core.formats.pickle.machine import short
from supra_core.formats.pickle.values import Storage, load, reading, stated_storage
from supra_core.formats.pickle.zip_records import Record, read_records
from supra_core.tensors import LazyTensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

# Bytes of data.pkl, or of all pickles before 1.6.
PICKLE_BYTES = 64_000_000
# Limit of a file's tensors in bytes, relative to the file and in any case: tied ones share storage.
SHARING, SHARING_BYTES = 4, 2**26


def read_file(path: str | Path) -> Any:
    """The checkpoint's nested structure with lazy tensors; refuses what would run code."""
    path = Path(path)
    if not os.path.isfile(path):
        raise FormatError(f"{path} does not exist: check the path")
    with reading(path):
        with open_weights(path) as file:
            head = file.read(legacy.HEAD_BYTES)
        if legacy.is_legacy(head):
            return legacy.read(path, PICKLE_BYTES)
        if legacy.is_tar(head):
            raise FormatError(
                f"{path} is a tar archive, as PyTorch before 0.1.10 wrote its checkpoints: save it "
                "again with a current PyTorch"
            )
        return _read_archive(path)


def state_dict(path: str | Path) -> dict[str, LazyTensor]:
    """A checkpoint's weights: its entry ``state_dict``, or all of it."""
    loaded = read_file(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise FormatError(f"{path} holds no state_dict: name a file with a model's weights")
    total = 0
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, LazyTensor):
            raise FormatError(
                f"{path}: entry '{short(name)}' is not a tensor, so this is not a state_dict"
            )
        total += math.prod(value.shape) * value.dtype.itemsize
    if total > SHARING * Path(path).stat().st_size + SHARING_BYTES:
        raise FormatError(
            f"{path}: its tensors amount to {total:,} bytes, many times the file: refused"
        )
    return dict(loaded)


def read_folder(folder: str | Path) -> dict[str, LazyTensor]:
    """The weights of ``pytorch_model.bin``, or else of all shards its index lists."""
    return safetensors.read_folder(folder, SINGLE, INDEX, state_dict)


def _read_archive(path: Path) -> Any:
    """The structure among an archive's records."""
    records = read_records(path)
    pickles = [name for name in records if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise FormatError(f"{path}: not a PyTorch checkpoint (no single data.pkl inside)")
    prefix = pickles[0].removesuffix("data.pkl")

    def storage(pid: Any) -> Storage:
        key, count, dtype, _ = stated_storage(pid, 5)
        record = records.get(f"{prefix}data/{key}")
        if record is None or count * dtype.itemsize > record.size:
            raise ValueError(f"storage '{short(key)}' is missing or too short")
        return Storage(path, record.offset, count, dtype)

    order = records.get(prefix + "byteorder")
    if order is not None and _content(path, order) != b"little":
        raise FormatError(f"{path}: big-endian checkpoint, which is not supported")
    return load(_content(path, records[pickles[0]]), storage)


def _content(path: Path, record: Record) -> bytes:
    if record.size > PICKLE_BYTES:
        raise FormatError(f"{path}: a pickle of more than {PICKLE_BYTES:,} bytes: refused")
    with open_regular(path) as file:
        file.seek(record.offset)
        content = file.read(record.size)
    if len(content) != record.size or zlib.crc32(content) != record.crc:
        raise ValueError("another checksum than stated")
    return content
