"""``SHA256SUMS``: the SHA-256 of every file of a folder, as GNU's sha256sum writes and checks it.

It tells a damaged or changed file from the one that was written. It is no signature: who can
change a file can change its line.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from supra_core.errors import FormatError
from supra_core.formats.inside import file_in, plain_name

NAME = "SHA256SUMS"
# Bytes of the file, which has a line of about a hundred for each of the folder's files.
SUMS_BYTES = 10_000_000
# The digest, a space, the space of text or the star of bytes, the name.
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


@dataclass(frozen=True)
class Problem:
    """A file that is not as it was written."""

    file: str
    problem: Literal["differs", "is missing", "cannot be read"]


@dataclass(frozen=True)
class Check:
    """What :func:`check` found; ``unlisted`` are files of the folder that have no sum.

    Weights and programs must have one; a note that somebody added need not.
    """

    files: int
    problems: tuple[Problem, ...]
    unlisted: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every file that is listed is there as it was, and nothing that counts is not."""
        return not self.problems and not any(map(_counts, self.unlisted))


def _counts(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".py"))


def write(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS`` for all files in ``folder``, which holds no other folders.

    ``known``: file name -> digest, of files whose sum was computed while they were written.
    """
    digests = dict(known or {})
    for path in folder.iterdir():
        if path.name != NAME and path.name not in digests:
            digests[path.name] = _digest(path)
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    (folder / NAME).write_text("".join(lines), encoding="utf-8")


def check(folder: str | Path) -> Check:
    """Compare a folder's files with its ``SHA256SUMS``; FormatError if there is none to read."""
    folder = Path(folder)
    listed = _read(folder)
    problems = []
    for name, digest in listed.items():
        path = file_in(folder, name)
        try:
            if not path.is_file():
                problems.append(Problem(name, "is missing"))
            elif _digest(path) != digest:
                problems.append(Problem(name, "differs"))
        except OSError:
            problems.append(Problem(name, "cannot be read"))
    names = {path.name for path in folder.iterdir() if os.path.isfile(path)}
    unlisted = sorted(names - listed.keys() - {NAME})
    return Check(len(listed), tuple(problems), tuple(unlisted))


def _read(folder: Path) -> dict[str, str]:
    """File name -> digest, as the folder's list states them."""
    if not os.path.isdir(folder):
        raise FormatError(f"{folder} is no folder: name the folder of a model")
    path = file_in(folder, NAME)
    try:
        with path.open("rb") as file:
            content = file.read(SUMS_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise FormatError(
            f"{folder} holds no {NAME}: convert the model again, or write one with sha256sum"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read ({error}): get the file again") from None
    if len(content) > SUMS_BYTES:
        raise FormatError(f"{path} is larger than {SUMS_BYTES:,} bytes: get the file again")
    listed: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else [text], 1):
        found = _LINE.fullmatch(line)
        if found is None or not plain_name(found[2]) or found[2] in listed:
            raise FormatError(
                f"{path}: line {number} is no sum of a file in this folder: get the file again"
            )
        listed[found[2]] = found[1].lower()
    return listed


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
