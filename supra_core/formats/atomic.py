"""Outputs that appear whole or not at all: written beside their place, then renamed.

What is renamed is on disk before, so that a loss of power leaves no empty files under its name.
A rename replaces nothing unless that was asked for, however many processes write to one place.
What is being written has a lock on it, which the system lets go of however its process ends: the
next one that writes to the same place removes what has none.
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

from supra_core.errors import SupraError, WriteError

_PARTIAL = ".partial"
# A disk that is full, a quota that is reached, a file larger than the system lets it grow.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What a file system without hard links says.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV}


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
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with _partial(place, is_folder=True) as partial:
            try:
                yield partial
                put_folder(partial, place, force)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = True) -> Iterator[Path]:
    """An empty file beside ``path`` to write to; it becomes ``path`` when the block ends.

    If the block raises, what it wrote is removed and ``path`` is as it was. ``replace`` False: a
    file that is there by then stays, and SupraError says so.
    """
    place = _resolved(path)
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        with _partial(place, is_folder=False) as partial:
            try:
                yield partial
                flush_to_disk(partial)
                if replace:
                    os.replace(partial, place)
                else:
                    _put_new_file(partial, place)
                _flush_names(place.parent)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise


def _put_new_file(partial: Path, place: Path) -> None:
    """Rename ``partial`` to ``place``; SupraError when that exists."""
    try:
        try:
            os.link(partial, place)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A name that is taken, so that nobody else gets it.
            place.touch(exist_ok=False)
            os.replace(partial, place)
    except FileExistsError:
        raise _file_exists(place) from None
    partial.unlink(missing_ok=True)


def check_replaceable(out: str | Path, force: bool, *, holds: str | None = None) -> None:
    """Raise SupraError where :func:`atomic_folder` would refuse to write ``out``.

    What killed processes left beside it is put right first.
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
    # A link that leads nowhere is there, too.
    if os.path.lexists(place) and not force:
        raise _file_exists(path)
    with writing(place):
        partial = _partial_name(place)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()


def _file_exists(path: str | Path) -> SupraError:
    return SupraError(f"{path} exists: name another place, or replace it with `force`")


def _folder_exists(place: Path) -> SupraError:
    return SupraError(f"{place} exists already: choose another folder, or replace it with `force`")


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


def put_folder(new: Path, place: Path, force: bool = True) -> None:
    """Rename ``new`` to ``place`` with all its files on disk; SupraError when something is there.

    ``force``: in place of what is there. Killed in the middle, ``place`` may be gone; what it was
    then has a name that the next one who writes there knows, and :func:`clear_partial` too.
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
        # Whoever else replaces it waits, and then replaces what is put here.
        with locked(place, wait=True) as held:
            is_there, aside = held is not False, _aside(place)
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
    """Remove a folder that is never seen with a part of its files."""
    os.rename(place, partial := _partial_name(place))
    shutil.rmtree(partial)


def clear_partial(folder: Path) -> None:
    """Remove what killed processes had not finished in ``folder``, and bring back what
    :func:`put_folder` was about to replace.

    Only for a folder that nobody else writes to.
    """
    for aside in folder.glob(".*.aside"):
        found = _ASIDE.fullmatch(aside.name)
        if found:
            _bring_back(aside, aside.with_name(found[1]))
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


# What was set aside, by older versions without a number of its own.
_ASIDE = re.compile(r"\.(.+?)(?:\.[0-9a-f]{8})?\.aside", re.DOTALL)


def _aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.aside")


def _bring_back(aside: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(aside)
    else:
        os.rename(aside, place)


@contextmanager
def _partial(place: Path, *, is_folder: bool) -> Iterator[Path]:
    """An empty folder or file beside ``place``, locked inside."""
    while True:
        partial = _partial_name(place)
        if is_folder:
            partial.mkdir()
        else:
            partial.touch(exist_ok=False)
        with locked(partial) as held:
            # Swept by another before it was locked: anew.
            if held is not False:
                yield partial
                return


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool | None]:
    """Inside, ``path`` is locked, whatever its name becomes: True.

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
            # Another has replaced it since: anew.
        except BlockingIOError:
            os.close(descriptor)
            return False, None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            return None, None
        os.close(descriptor)


def _sweep(place: Path) -> None:
    """Remove what killed processes left beside ``place``, and bring back what they set aside."""
    left = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.(partial|aside)")
    with suppress(OSError, ValueError):
        for path in list(place.parent.iterdir()):
            found = left.fullmatch(path.name)
            if found is None:
                continue
            with locked(path) as held, suppress(OSError):
                if not held:
                    continue
                if found[1] == "aside":
                    _bring_back(path, place)
                elif path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


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
