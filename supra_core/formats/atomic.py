"""Outputs that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supra_core.errors import SupraError


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
    with _writing(place):
        partial.mkdir(parents=True)
        try:
            yield partial
            _swap(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it replaces ``path`` when the block ends.

    If the block raises, what it wrote is removed and ``path`` is as it was.
    """
    place = _resolved(path)
    with _writing(place):
        partial = _partial_name(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            flush_to_disk(partial)
            os.replace(partial, place)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def check_replaceable(out: str | Path, force: bool, *, holds: str | None = None) -> None:
    """Raise SupraError where :func:`atomic_folder` would refuse to write ``out``."""
    place = _resolved(out)
    if not place.exists():
        return
    if not place.is_dir():
        raise SupraError(f"{place} is a file: choose a folder that does not exist yet")
    if not any(place.iterdir()):
        return
    if not force:
        raise SupraError(f"{place} exists already: choose another folder, or pass --force")
    if holds is not None and not (place / holds).exists():
        raise SupraError(
            f"{place} holds no {holds}, so it is not replaced even by force: choose another folder"
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
    with _writing(place):
        partial = _partial_name(place)
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()


def flush_to_disk(path: Path) -> None:
    """Return once the file's bytes are on disk, so that a rename after it cannot outrun them."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _resolved(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


def _partial_name(place: Path) -> Path:
    return place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.partial")


def _swap(new: Path, place: Path) -> None:
    if not place.exists():
        os.rename(new, place)
        return
    old = _partial_name(place)
    os.rename(place, old)
    try:
        os.rename(new, place)
    except BaseException:
        os.rename(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SupraError(f"{place} could not be written: {error}") from error
