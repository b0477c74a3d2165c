"""PyTorch checkpoints (``.pt``, ``.bin``) read without torch and without running their code.

A checkpoint is a zip archive: ``data.pkl`` describes the structure, ``data/N`` hold the numbers,
stored uncompressed; before PyTorch 1.6 it was pickles and numbers one behind the other
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
from supra_core.formats.inside import file_in, has_file, open_regular
from supra_core.formats.lfs import refuse_pointer
from supra_core.formats.pickle import legacy as torch_legacy
from supra_core.formats.pickle.machine import short
from supra_core.formats.pickle.values import STORAGE_TYPES, Storage, load
from supra_core.formats.pickle.zip_records import Record, read_records
from supra_core.formats.safetensors import shard_files
from supra_core.tensors import LazyTensor

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

# Bytes of data.pkl, or of all pickles before 1.6.
PICKLE_BYTES = 64_000_000
# Bytes that a file's tensors may amount to: tied ones share a storage, so more than the file has.
SHARING, SHARING_BYTES = 4, 2**26


def read_file(path: str | Path) -> Any:
    """The checkpoint's nested structure, its tensors lazy; refuses what would run code."""
    path = Path(path)
    if not os.path.isfile(path):
        raise FormatError(f"{path} does not exist: check the path")
    try:
        with open_regular(path) as file:
            head = file.read(torch_legacy.HEAD_BYTES)
        refuse_pointer(path, head)
        if torch_legacy.is_legacy(head):
            return torch_legacy.read(path, PICKLE_BYTES)
        if torch_legacy.is_tar(head):
            raise FormatError(
                f"{path} is a tar archive, as PyTorch before 0.1.10 wrote its checkpoints: save it "
                "again with a current PyTorch"
            )
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
    """The weights of ``pytorch_model.bin``, or else of all shards its index lists."""
    folder = Path(folder)
    if has_file(folder, SINGLE) or not has_file(folder, INDEX):
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
        return load(self.path, content, self.storage)

    def storage(self, pid: Any) -> Storage:
        """What a persistent id means: ("storage", type, key, device, count)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise FormatError(f"{self.path}: unknown reference in its pickle: get the file again")
        _, kind, key, _device, count = pid
        record = self.records.get(f"{self.prefix}data/{key}") if isinstance(key, str) else None
        dtype = STORAGE_TYPES.get(kind) if isinstance(kind, str) else None
        if record is None or dtype is None or type(count) is not int:
            raise FormatError(f"{self.path}: storage '{short(key)}' is missing: get the file again")
        if count < 0 or count * dtype.itemsize > record.size:
            raise FormatError(f"{self.path}: storage '{key}' is too short: get the file again")
        return Storage(self.path, record.offset, count, dtype)

    def _content(self, name: str, record: Record) -> bytes:
        if record.size > PICKLE_BYTES:
            raise FormatError(f"{self.path}: {name} has more than {PICKLE_BYTES:,} bytes: refused")
        with open_regular(self.path) as file:
            file.seek(record.offset)
            content = file.read(record.size)
        if len(content) != record.size or zlib.crc32(content) != record.crc:
            raise FormatError(f"{self.path}: {name} is damaged: get the file again")
        return content
