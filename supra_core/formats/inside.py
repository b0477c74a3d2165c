"""Files of a model's folder, none of which may lie outside it.

A folder from a stranger may hold links, and an index may name files: neither reaches anything
that is not the model's own. The cache of huggingface_hub is made of links, from
``models--ORG--NAME/snapshots/REVISION/`` to ``models--ORG--NAME/blobs/``; there the folder of the
whole repository is the border.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from supra_core.errors import FormatError

_HUB_FOLDER, _SNAPSHOTS = "models--", "snapshots"


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

    Nothing need be there. Links are followed, and what they lead to must be inside.
    """
    if not plain_name(name):
        raise FormatError(f"{folder}: '{name}' is no file name inside the folder: refused")
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


def open_regular(path: Path) -> BufferedReader:
    """``path`` for reading bytes; :class:`FormatError` where it is no regular file.

    A pipe would be waited for without end, a device read without end. OSError as of :func:`open`.
    """
    # Not to wait for a pipe's other side; it changes nothing for a file.
    opener = lambda name, flags: os.open(name, flags | os.O_NONBLOCK)  # noqa: E731
    file = open(path, "rb", opener=opener)  # noqa: SIM115 - the caller closes it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FormatError(f"{path} is no regular file, but a pipe or a device: put a file there")
    return file


def files_in(folder: Path, pattern: str) -> Iterator[Path]:
    """The files whose names match ``pattern``, in order; :class:`FormatError` as :func:`file_in`.

    ``pattern`` matches names, as in :meth:`pathlib.Path.glob`.
    """
    for path in sorted(folder.glob(pattern)):
        yield file_in(folder, path.name)


def _border(folder: Path) -> Path:
    """What a link may not leave: the folder, or the repository's in the hub's cache."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        if place.parent.name == _SNAPSHOTS and place.parent.parent.name.startswith(_HUB_FOLDER):
            return place.parent.parent
    return real
