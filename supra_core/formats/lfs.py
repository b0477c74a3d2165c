"""Git LFS pointers: the lines that stand for a large file until it is fetched."""

from __future__ import annotations

from pathlib import Path

from supra_core.errors import FormatError

_BEGINNING = b"version https://git-lfs.github.com/spec/"
# Bytes that a reader has to give :func:`refuse_pointer`.
BEGINNING_BYTES = len(_BEGINNING)


def refuse_pointer(path: Path, content: bytes) -> None:
    """:class:`FormatError` if ``content``, with which ``path`` begins, is a pointer's."""
    if content.startswith(_BEGINNING):
        raise FormatError(
            f"{path} is a Git LFS pointer, not the file itself: run git lfs pull in its "
            "repository, or get the file again"
        )
