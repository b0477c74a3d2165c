"""Outputs that appear whole or not at all: written beside their place, then renamed.

An output is on disk before it is renamed, so that a power failure leaves no empty file under its
name. A rename replaces nothing unless the caller asks for it, however many processes write to one
place. While an output is written, it is locked; the system releases the lock when the process
ends, and the next process that writes to the same place removes what is not locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from supra_core.errors import SupraError, WriteError, reason

# A full disk, a reached quota, a file larger than the system allows.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of a file system without hard links.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}
# An unfinished output, or a folder that was about to be replaced; older versions gave no number.
_LEFT = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.(partial|aside)", re.DOTALL)


@contextmanager
def atomic_folder(
    out: str | Path, force: bool = False, *, holds: str | None = None
) -> Iterator[Path]:
    """An empty folder beside ``out`` that becomes ``out`` when the block ends.

    If the block raises (Ctrl-C included), the folder is removed and ``out`` is unchanged. An
    existing ``out`` is refused unless it is empty or ``force`` is given; then it is replaced once
    the new folder is complete. ``holds`` names a file that an existing ``out`` must hold to be
    replaced, so that a mistyped path never deletes something else.
    """
    place = _resolved(out)
    check_replaceable(place, force, holds=holds)
    with _partial(place, is_folder=True) as partial:
        yield partial
        put_folder(partial, place, force)


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """An empty file beside ``path`` to write to; it becomes ``path`` when the block ends.

    If the block raises, the file is removed and ``path`` is unchanged. ``replace`` False: a file
    that exists by then stays, and SupraError says so.
    """
    place = _resolved(path)
    with _partial(place, is_folder=False) as partial:
        yield partial
        flush_to_disk(partial)
        if replace:
            os.replace(partial, place)
        else:
            _put_new_file(partial, place)
        _flush_names(place.parent)


@contextmanager
def _partial(place: Path, *, is_folder: bool) -> Iterator[Path]:
    """An empty folder or file beside ``place``, locked; removed if the block raises."""
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        held: bool | None = False
        # Another process may sweep it before it is locked.
        while held is False:
            partial = _beside(place, "partial")
            if is_folder:
                partial.mkdir()
            else:
                partial.touch(exist_ok=False)
            with locked(partial) as held:
                if held is False:
                    continue
                try:
                    yield partial
                except BaseException:
                    with suppress(OSError):
                        _remove(partial)
                    raise


def _put_new_file(partial: Path, place: Path) -> None:
    """Rename ``partial`` to ``place``; SupraError when that exists."""
    try:
        try:
            os.link(partial, place)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Take the name, so that nobody else gets it.
            place.touch(exist_ok=False)
            os.replace(partial, place)
    except FileExistsError:
        raise _file_exists(place) from None
    partial.unlink(missing_ok=True)


def check_replaceable(out: str | Path, force: bool, *, holds: str | None = None) -> None:
    """Raise SupraError where :func:`atomic_folder` would refuse to write ``out``.

    First cleans up after killed processes.
    """
    place = _resolved(out)
    with writing(place):
        _sweep(place)
        if not place.exists():
            return
        if not place.is_dir():
            raise SupraError(f"{place} is a file: choose a folder that does not exist yet")
        empty = not any(place.iterdir())
        if not empty and not force:
            raise _folder_exists(place)
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
    # A link that leads nowhere exists, too.
    if os.path.lexists(place) and not force:
        raise _file_exists(path)
    with writing(place):
        partial = _beside(place, "partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()


def _file_exists(path: str | Path) -> SupraError:
    return SupraError(f"{path} exists: name another place, or replace it with `force`")


def _folder_exists(place: Path) -> SupraError:
    return SupraError(f"{place} exists already: choose another folder, or replace it with `force`")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns an OSError of writing ``place`` into a WriteError with the remedy."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"{place} could not be written ({reason(error)}): {remedy(error)}"
        ) from error


def remedy(error: OSError) -> str:
    """What to do about an error of writing."""
    if error.errno in _NO_ROOM:
        return "make room and start again"
    return "check the path and who may write there"


def flush_to_disk(path: Path) -> None:
    """Return once the bytes of a file, or the names in a folder, are on disk.

    A rename after it cannot overtake them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_folder(new: Path, place: Path, force: bool = True) -> None:
    """Rename ``new`` to ``place`` with all its files on disk; SupraError when something is there.

    ``force``: replace what is there. If the process is killed meanwhile, ``place`` may be gone;
    the next process that writes there, or :func:`clear_partial`, restores what it was.
    """
    _flush_folder(new)
    if force:
        _exchange(new, place)
    else:
        try:
            # The system replaces an empty folder by this, and nothing else.
            os.rename(new, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _folder_exists(place) from None
    _flush_names(place.parent)


def _exchange(new: Path, place: Path) -> None:
    """Rename ``new`` to ``place`` and remove what was there."""
    while True:
        # Another process that replaces it waits, and then replaces what is put here.
        with locked(place, wait=True) as held:
            is_there, aside = held is not False, _beside(place, "aside")
            if is_there:
                os.rename(place, aside)
            try:
                os.rename(new, place)
            except OSError as error:
                # Another was faster where nothing was to be locked: that one is replaced.
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not is_there:
                    continue
                if is_there:
                    os.rename(aside, place)
                raise
            if is_there:
                shutil.rmtree(aside, ignore_errors=True)
            return


def remove_folder(place: Path) -> None:
    """Remove a folder at once: nobody sees it with a part of its files."""
    os.rename(place, partial := _beside(place, "partial"))
    shutil.rmtree(partial)


def clear_partial(folder: Path) -> None:
    """Remove unfinished outputs in ``folder``, and restore what :func:`put_folder` set aside.

    Only for a folder that no other process writes to.
    """
    # A folder that does not exist holds nothing.
    for left in list(folder.glob(".*")):
        _clean(left)


def is_partial(path: Path) -> bool:
    """Whether something of that name was never finished."""
    return path.name.startswith(".") and path.name.endswith(".partial")


def _sweep(place: Path) -> None:
    """Clean up what killed processes left beside ``place``."""
    with suppress(OSError, ValueError):
        for left in list(place.parent.iterdir()):
            found = _LEFT.fullmatch(left.name)
            if found and found[1] == place.name:
                with locked(left) as held, suppress(OSError):
                    if held:
                        _clean(left)


def _clean(left: Path) -> None:
    """Remove an unfinished output, or restore a folder that was set aside and not replaced."""
    found = _LEFT.fullmatch(left.name)
    if found and found[2] == "aside" and not left.with_name(found[1]).exists():
        os.rename(left, left.with_name(found[1]))
    elif found:
        _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_here(place: Path) -> bool:
    """Whether the working directory is ``place`` or in it: replacing it would delete that."""
    try:
        return Path.cwd().is_relative_to(place)
    except OSError:
        return False


def _resolved(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.{kind}")


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """True: ``path`` is locked inside the block, whatever its name becomes.

    False: there is no such path, or another process has locked it and ``wait`` is not given.
    None: it cannot be locked, as on file systems without locks.
    """
    held, descriptor = _lock(path, wait)
    try:
        yield held
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path, wait: bool) -> tuple[bool | None, int | None]:
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return False, None
        except OSError:
            return None, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return True, descriptor
            # Another process has replaced it since: try again.
        except BlockingIOError:
            os.close(descriptor)
            return False, None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            return None, None
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            _flush_folder(path)
        else:
            flush_to_disk(path)
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    # Some file systems cannot flush folders.
    with suppress(OSError):
        flush_to_disk(folder)
