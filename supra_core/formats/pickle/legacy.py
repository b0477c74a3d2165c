"""Checkpoints of PyTorch 0.1.10 to 1.5: pickles one behind the other, then the numbers.

A magic number, a version, what kind of machine wrote it, the structure, and the keys of its
storages in order; then for each storage its count as an int64 and its numbers, all little-endian.
(PyTorch's ``torch/serialization.py``, ``_legacy_save``.) Every pickle goes through the machine of
:mod:`supra_core.formats.pickle.machine`, and no number is read before all have their place in the
file.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError
from supra_core.formats.inside import open_regular
from supra_core.formats.pickle.machine import short
from supra_core.formats.pickle.values import STORAGE_TYPES, Storage, load

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# The magic number as pickles of protocol 2 and later write it, and as those before.
_WRITTEN = (_MAGIC.to_bytes(10, "little"), str(_MAGIC).encode())
_HEAD = 64
_TAR_AT, _TAR = 257, b"ustar"
_COUNT_BYTES = 8


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is one of these; :data:`HEAD_BYTES` are enough."""
    return any(written in head[:_HEAD] for written in _WRITTEN)


def is_tar(head: bytes) -> bool:
    """Whether it is an archive, as PyTorch before 0.1.10 wrote it."""
    return head[_TAR_AT:].startswith(_TAR)


HEAD_BYTES = _TAR_AT + len(_TAR)


def read(path: Path, limit: int) -> Any:
    """The structure of the file, its tensors lazy; ``limit``: bytes that its pickles may take.

    :class:`FormatError` for what is damaged, unsafe, or reaches past the file.
    """
    with open_regular(path) as file:
        content = io.BytesIO(file.read(limit))
    storages = _Storages(path)
    for expected, what in ((_MAGIC, "magic number"), (_VERSION, "version")):
        found = load(path, content, storages.none)
        if type(found) is not int or found != expected:
            raise FormatError(f"{path}: its {what} is {short(found)}: get the file again")
    system = load(path, content, storages.none)
    if type(system) is not dict or system.get("little_endian") is not True:
        raise FormatError(f"{path}: not from a little-endian machine, which is not supported")
    loaded = load(path, content, storages.named)
    storages.place(load(path, content, storages.none), content.tell())
    return loaded


class _Storages:
    """The storages that the structure names, by key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Storage] = {}

    def none(self, pid: Any) -> Storage:
        """For pickles that name none."""
        raise FormatError(f"{self.path}: unknown reference in its pickle: get the file again")

    def named(self, pid: Any) -> Storage:
        """What a persistent id means: ("storage", type, key, device, count, view)."""
        if type(pid) is not tuple or len(pid) != 6 or pid[0] != "storage":
            return self.none(pid)
        _, kind, key, _device, count, view = pid
        dtype = STORAGE_TYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
            return self.none(pid)
        if view is not None:
            raise FormatError(
                f"{self.path}: its storages are parts of others, as PyTorch before 0.4 wrote them: "
                "save it again with a current PyTorch"
            )
        storage = self.found.setdefault(key, Storage(self.path, 0, count, dtype))
        if (storage.count, storage.dtype) != (count, dtype):
            raise FormatError(f"{self.path}: storage '{short(key)}' is two things: get it again")
        return storage

    def place(self, keys: Any, start: int) -> None:
        """Set the offsets of the storages ``keys``, which lie in this order from ``start`` on."""
        if type(keys) is not list or len(keys) != len(self.found):
            raise FormatError(f"{self.path}: its list of storages is damaged: get the file again")
        placed: set[str] = set()
        with open_regular(self.path) as file:
            size = file.seek(0, os.SEEK_END)
            for key in keys:
                storage = self.found.get(key) if isinstance(key, str) else None
                if storage is None or key in placed:
                    raise FormatError(
                        f"{self.path}: storage '{short(key)}' is unknown: get it again"
                    )
                placed.add(key)
                file.seek(start)
                count = int.from_bytes(file.read(_COUNT_BYTES), "little")
                start += _COUNT_BYTES
                if count != storage.count:
                    raise FormatError(
                        f"{self.path}: storage '{short(key)}' has {count} numbers in the file and "
                        f"{storage.count} in its pickle: get the file again"
                    )
                storage.offset = start
                start += count * storage.dtype.itemsize
                if start > size:
                    raise FormatError(
                        f"{self.path}: truncated at storage '{short(key)}': get the file again"
                    )
