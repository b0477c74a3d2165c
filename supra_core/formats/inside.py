"""Files of a model's folder, opened and read only where they are the model's own.

A folder from a stranger may hold links, and an index may name files: neither reaches a file
outside the folder. The cache of huggingface_hub is made of links, from
``models--ORG--NAME/snapshots/REVISION/`` to ``models--ORG--NAME/blobs/``; there the border is the
folder of the whole repository.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from supra_core.errors import FormatError, reason

_HUB_FOLDER, _SNAPSHOTS = "models--", "snapshots"
_LFS = b"version https://git-lfs.github.com/spec/"


def plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file in a folder, and no way out of it."""
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name not in (".", "..")
        and not any(c in name for c in "/\\\0\n\r")
    )


def file_in(folder: Path, name: str) -> Path:
    """``folder / name``; :class:`FormatError` where that leads out of the folder.

    Nothing need be there. Links are followed, and their target must be inside.
    """
    if not plain_name(name):
        raise FormatError(f"{folder}: '{name}' is not a file name inside the folder: refused")
    path = folder / name
    try:
        real = Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({error}): check the path") from None
    if not real.is_relative_to(_border(folder)):
        raise FormatError(
            f"{path} is a link that leads out of its folder: refused; put the file itself there"
        )
    return path


def has_file(folder: Path, name: str) -> bool:
    """Whether ``folder`` holds such a file; :class:`FormatError` for a link that leads out."""
    return os.path.isfile(folder / name) and os.path.isfile(file_in(folder, name))


def files_in(folder: Path, pattern: str) -> Iterator[Path]:
    """The files whose names match ``pattern``, a glob, in order; raises as :func:`file_in`."""
    for path in sorted(folder.glob(pattern)):
        yield file_in(folder, path.name)


def open_regular(path: Path) -> BufferedReader:
    """``path`` for reading bytes; :class:`FormatError` unless it is a regular file.

    Reading a pipe or a device might never end. OSError as :func:`open`.
    """
    # Do not wait for the other side of a pipe; it changes nothing for a file.
    opener = lambda name, flags: os.open(name, flags | os.O_NONBLOCK)  # noqa: E731
    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FormatError(f"{path} is a pipe or a device, not a regular file: put a file there")
    return file


def open_weights(path: Path) -> BufferedReader:
    """As :func:`open_regular`; :class:`FormatError` for a Git LFS pointer, too."""
    file = open_regular(path)
    try:
        _refuse_pointer(path, file.peek(len(_LFS)))
    except BaseException:
        file.close()
        raise
    return file


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    :class:`FormatError` if it is absent, cannot be read, is larger, or is a Git LFS pointer.
    """
    try:
        with open_regular(path) as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise FormatError(f"{path} does not exist: check the path") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read ({reason(error)}): check the path") from None
    _refuse_pointer(path, content)
    if len(content) > limit:
        raise FormatError(f"{path} is larger than {limit:,} bytes: name the right file")
    return content


def _refuse_pointer(path: Path, content: bytes) -> None:
    """:class:`FormatError` if a file that begins with ``content`` stands for one in Git LFS."""
    if content.startswith(_LFS):
        raise FormatError(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its "
            "repository, or get the file again"
        )


def _border(folder: Path) -> Path:
    """What a link may not leave: the folder, or the repository's in the hub's cache."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if place.parent.name == _SNAPSHOTS and place.parent.parent.name.startswith(_HUB_FOLDER):
            return place.parent.parent
    return real
