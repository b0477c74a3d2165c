"""Checkpoints of PyTorch 0.1.10 to 1.5: pickles one after the other, then the numbers.

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
from typing import Any, BinaryIO

from supra_core.errors import FormatError
from supra_core.formats.inside import open_regular
from supra_core.formats.pickle.machine import short
from supra_core.formats.pickle.values import Storage, load, stated_storage

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
# The magic number as pickles of protocol 2 and later write it, and as those before.
_WRITTEN = (_MAGIC.to_bytes(10, "little"), str(_MAGIC).encode())
_HEAD = 64
_TAR_AT, _TAR = 257, b"ustar"
HEAD_BYTES = _TAR_AT + len(_TAR)
_COUNT_BYTES = 8


def is_legacy(head: bytes) -> bool:
    """Whether a file that begins so is one of these; :data:`HEAD_BYTES` are enough."""
    return any(written in head[:_HEAD] for written in _WRITTEN)


def is_tar(head: bytes) -> bool:
    """Whether it is an archive, as PyTorch before 0.1.10 wrote it."""
    return head[_TAR_AT:].startswith(_TAR)


def read(path: Path, limit: int) -> Any:
    """The structure of the file, its tensors lazy; ``limit``: bytes that its pickles may take.

    Raises as :func:`supra_core.formats.pickle.values.load` for what is damaged, unsafe, or reaches
    past the file.
    """
    storages: dict[str, Storage] = {}

    def no_storage(pid: Any) -> Storage:
        raise ValueError("unknown reference in its pickle")

    def storage(pid: Any) -> Storage:
        key, count, dtype, view = stated_storage(pid, 6)
        if view is not None:
            raise FormatError(
                f"{path}: its storages are parts of others, as PyTorch before 0.4 wrote them: "
                "save it again with a current PyTorch"
            )
        found = storages.setdefault(key, Storage(path, 0, count, dtype))
        if (found.count, found.dtype) != (count, dtype):
            raise ValueError(f"storage '{short(key)}' is two things")
        return found

    with open_regular(path) as file:
        content = io.BytesIO(file.read(limit))
        for expected, what in ((_MAGIC, "magic number"), (_VERSION, "version")):
            found = load(content, no_storage)
            if type(found) is not int or found != expected:
                raise ValueError(f"its {what} is {short(found)}")
        system = load(content, no_storage)
        if type(system) is not dict or system.get("little_endian") is not True:
            raise FormatError(f"{path}: not from a little-endian machine, which is not supported")
        loaded = load(content, storage)
        _place(storages, load(content, no_storage), file, content.tell())
    return loaded


def _place(storages: dict[str, Storage], keys: Any, file: BinaryIO, start: int) -> None:
    """Set the offsets of the storages ``keys``, which lie in this order from ``start`` on."""
    if type(keys) is not list or len(keys) != len(storages):
        raise ValueError("its list of storages is damaged")
    size = file.seek(0, os.SEEK_END)
    left = dict(storages)
    for key in keys:
        storage = left.pop(key, None) if isinstance(key, str) else None
        if storage is None:
            raise ValueError(f"storage '{short(key)}' is unknown")
        file.seek(start)
        written = file.read(_COUNT_BYTES)
        storage.offset = start + _COUNT_BYTES
        start = storage.offset + storage.count * storage.dtype.itemsize
        count = int.from_bytes(written, "little")
        if len(written) == _COUNT_BYTES and count != storage.count:
            raise ValueError(
                f"storage '{short(key)}' has {count} numbers in the file and {storage.count} in "
                "its pickle"
            )
        if start > size:
            raise ValueError(f"truncated at storage '{short(key)}'")
