"""``SHA256SUMS``: the SHA-256 of every file of a folder, as GNU's sha256sum writes and checks it.

It shows whether a file is damaged or changed. It is not a signature: whoever can change a file can
change its line.
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
from supra_core.formats.atomic import atomic_file
from supra_core.formats.inside import file_in, has_file, open_regular, plain_name, read_bytes

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
    """The result of :func:`check`; ``unlisted``: files of the folder that have no sum.

    Weights and programs must have one; other files, such as a note, need not.
    """

    files: int
    problems: tuple[Problem, ...]
    unlisted: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all listed files are unchanged, and all weights and programs are listed."""
        needed = (".safetensors", ".bin", ".pt", ".py")
        return not self.problems and not any(name.endswith(needed) for name in self.unlisted)


def write(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write ``SHA256SUMS`` for all files in ``folder`` itself.

    ``known``: file name -> digest, for files whose sum was computed while they were written.
    """
    digests = dict(known or {})
    for path in folder.iterdir():
        if path.name != NAME and path.name not in digests and path.is_file():
            digests[path.name] = digest_of(path)
    write_sums(folder, digests)


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` with these lines alone: file name -> digest."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    with atomic_file(folder / NAME) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def refuse_changed(folder: Path, remedy: str) -> None:
    """Raise FormatError when a listed file has changed; ``remedy`` ends the sentence.

    A folder of an older version, which has no list, passes.
    """
    if not has_file(folder, NAME):
        return
    for problem in check(folder).problems:
        said = "is not as it was written" if problem.problem == "differs" else problem.problem
        raise FormatError(f"{folder / problem.file} {said}: {remedy}")


def check(folder: str | Path) -> Check:
    """Compare a folder's files with its ``SHA256SUMS``; FormatError if there is none to read."""
    folder = Path(folder)
    stated = listed(folder)
    problems = []
    for name, digest in stated.items():
        path = file_in(folder, name)
        try:
            if not path.is_file():
                problems.append(Problem(name, "is missing"))
            elif digest_of(path) != digest:
                problems.append(Problem(name, "differs"))
        except OSError:
            problems.append(Problem(name, "cannot be read"))
    names = {path.name for path in folder.iterdir() if os.path.isfile(path)}
    unlisted = sorted(names - stated.keys() - {NAME})
    return Check(len(stated), tuple(problems), tuple(unlisted))


def listed(folder: Path) -> dict[str, str]:
    """File name -> digest, as the folder's list states them; FormatError without one."""
    if not os.path.isdir(folder):
        raise FormatError(f"{folder} is not a folder: name the folder of a model")
    path = file_in(folder, NAME)
    if not os.path.lexists(path):
        raise FormatError(
            f"{folder} holds no {NAME}: convert the model again, or write one with sha256sum"
        )
    try:
        text = read_bytes(path, SUMS_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} cannot be read ({error}): get the file again") from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else [text], 1):
        sum_ = _LINE.fullmatch(line)
        if sum_ is None or not plain_name(sum_[2]) or sum_[2] in found:
            raise FormatError(
                f"{path}: line {number} is not the sum of a file in this folder: get it again"
            )
        found[sum_[2]] = sum_[1].lower()
    return found


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
