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
from supra_core.formats.atomic import atomic_file
from supra_core.formats.inside import file_in, has_file, open_regular, plain_name

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
    """Write ``SHA256SUMS`` for all files in ``folder``, but none of the folders in it.

    ``known``: file name -> digest, of files whose sum was computed while they were written.
    """
    digests = dict(known or {})
    for path in folder.iterdir():
        if path.name != NAME and path.name not in digests and path.is_file():
            digests[path.name] = digest_of(path)
    write_sums(folder, digests)


def write_sums(folder: Path, digests: Mapping[str, str]) -> None:
    """Write ``SHA256SUMS`` for these files alone: file name -> digest."""
    lines = [f"{digests[name]}  {name}\n" for name in sorted(digests)]
    with atomic_file(folder / NAME) as beside:
        beside.write_text("".join(lines), encoding="utf-8")


def refuse_changed(folder: Path, remedy: str) -> None:
    """Raise FormatError when a listed file is not as it was written; ``remedy`` ends the sentence.

    A folder that has no list, as older versions left it, passes.
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
        raise FormatError(f"{folder} is no folder: name the folder of a model")
    path = file_in(folder, NAME)
    try:
        with open_regular(path) as file:
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
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n")[:-1] if text.endswith("\n") else [text], 1):
        sum_ = _LINE.fullmatch(line)
        if sum_ is None or not plain_name(sum_[2]) or sum_[2] in found:
            raise FormatError(
                f"{path}: line {number} is no sum of a file in this folder: get the file again"
            )
        found[sum_[2]] = sum_[1].lower()
    return found


def digest_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
