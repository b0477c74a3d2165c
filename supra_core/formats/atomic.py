"""Outputs that appear whole or not at all: written beside their place, then renamed.

What is renamed is on disk before, so that a loss of power leaves no empty files under its name.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from supra_core.errors import SupraError, WriteError

_PARTIAL = ".partial"
# A disk that is full, a quota that is reached, a file larger than the system lets it grow.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_folder(
    out: str | Path, force: bool = False, *, holds: str | None = None
) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends.

    If the block raises (Ctrl-C included), the folder is removed and ``out`` is as it was. An
    existing ``out`` is refused unless it is empty or ``force`` is given; then it is replaced only
    once the new folder is complete. ``holds`` names a file that an existing ``out`` must hold to
    be replaced, so that a mistyped path never deletes something else.
    """
    place = _resolved(out)
    check_replaceable(place, force, holds=holds)
    partial = _partial_name(place)
    with writing(place):
        partial.mkdir(parents=True)
        try:
            yield partial
            put_folder(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` when the block ends.

    If the block raises, what it wrote is removed and ``path`` is as it was.
    """
    place = _resolved(path)
    with writing(place):
        partial = _partial_name(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            flush_to_disk(partial)
            os.replace(partial, place)
            _flush_names(place.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_replaceable(out: str | Path, force: bool, *, holds: str | None = None) -> None:
    """Raise SupraError where :func:`atomic_folder` would refuse to write ``out``."""
    place = _resolved(out)
    with writing(place):
        if not place.exists():
            return
        if not place.is_dir():
            raise SupraError(f"{place} is a file: choose a folder that does not exist yet")
        empty = not any(place.iterdir())
        if not empty and not force:
            raise SupraError(f"{place} exists already: choose another folder, or pass --force")
        if not empty and holds is not None and not (place / holds).exists():
            raise SupraError(
                f"{place} holds no {holds}, so it is not replaced even by force: choose another "
                "folder"
            )
        if _is_here(place):
            raise SupraError(
                f"{place} is or holds the current folder, which an output would replace: name "
                "another folder"
            )


def check_new_file(path: str | Path, force: bool) -> None:
    """Raise SupraError when the file may not be replaced, or none can be written there.

    Asked before long work; folders above it are made.
    """
    place = Path(path)
    if "\0" in str(place):
        raise SupraError(f"{path!s:.40} has a null byte in its name: name another file")
    if os.path.isdir(place):
        raise SupraError(f"{path} is a folder: name a file")
    # A link that leads nowhere is there, too.
    if os.path.lexists(place) and not force:
        raise SupraError(f"{path} exists: name another place, or replace it with --force")
    with writing(place):
        partial = _partial_name(place)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what the system says against writing ``place`` into a WriteError with the remedy."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{place} could not be written ({reason(error)}): {remedy(error)}"
        ) from error


def reason(error: OSError) -> str:
    """What went wrong, without the number."""
    return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]


def remedy(error: OSError) -> str:
    """What to do about it."""
    if error.errno in _NO_ROOM:
        return "make room and start again"
    return "check the path and who may write there"


def flush_to_disk(path: Path) -> None:
    """Return once the file's bytes are on disk, so that a rename after it cannot outrun them."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_folder(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place``, in place of what is there, with all its files on disk.

    Killed in the middle, ``place`` may be gone; what it was then has the name that
    :func:`clear_partial` looks for.
    """
    _flush_folder(new)
    aside = _aside(place)
    if place.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(place, aside)
    try:
        os.rename(new, place)
    except BaseException:
        if aside.exists():
            os.rename(aside, place)
        raise
    _flush_names(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(place: Path) -> None:
    """Remove a folder that is never seen with a part of its files."""
    os.rename(place, partial := _partial_name(place))
    shutil.rmtree(partial)


def clear_partial(folder: Path) -> None:
    """Remove what killed processes had not finished in ``folder``, and bring back what
    :func:`put_folder` was about to replace.

    Only for a folder that nobody else writes to.
    """
    for aside in folder.glob(".*.aside"):
        place = aside.with_name(aside.name.removeprefix(".").removesuffix(".aside"))
        if place.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, place)
    for partial in folder.glob(f".*{_PARTIAL}"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def is_partial(path: Path) -> bool:
    """Whether something of that name was never finished."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def _is_here(place: Path) -> bool:
    """Whether the working directory is ``place`` or in it: replaced, it would be a deleted one."""
    try:
        return Path.cwd().is_relative_to(place)
    except OSError:
        return False


def _resolved(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _partial_name(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.aside")


def _flush_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _flush_folder(path)
        else:
            flush_to_disk(path)
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    """Return once the folder's entries are on disk; where folders cannot be flushed, at once."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
