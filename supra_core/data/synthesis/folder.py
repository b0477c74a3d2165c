"""The folder of a synthesis: samples, one batch at a time, and the texts made from them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from supra_core.data.synthesis.rows import KINDS, Kind, Sample
from supra_core.errors import FormatError, SupraError
from supra_core.formats.atomic import atomic_file, writing
from supra_core.formats.jsonfile import parse, read_object

SAMPLES, RECORD = "samples.jsonl", "synthesis.json"
_ANEW = "begin again with `force`"
_FIELDS = {"batch", "row", "rows", *(field.name for field in fields(Sample))}
TEXTS: dict[Kind, str] = {"document": "documents.txt", "conversation": "conversations.txt"}


@dataclass(frozen=True)
class Tally:
    """What has been sampled so far; ``tokens`` and ``finished``: of kept samples, by kind."""

    batches: int
    rows: int
    sampled: int
    kept: Mapping[str, int]
    tokens: Mapping[str, int]
    finished: Mapping[str, int]
    dropped: Mapping[str, int]

    @property
    def total(self) -> int:
        """Tokens of all kept samples."""
        return sum(self.tokens.values())


class SampleStore:
    """The samples of whole batches in ``folder``/samples.jsonl, one JSON object a line.

    Opening it removes an incomplete batch of a killed run. FormatError when a line in the middle is
    damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES
        self._lines, length = _whole_batches(self.path)
        if self.path.exists() and self.path.stat().st_size > length:
            os.truncate(self.path, length)

    def append(self, batch: int, samples: Sequence[Sample]) -> None:
        """Add all samples of a batch; they are on disk on return."""
        lines = [
            {"kind": sample.kind, "batch": batch, "row": row, "rows": len(samples)} | asdict(sample)
            for row, sample in enumerate(samples)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with writing(self.path), open(self.path, "ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self._lines += lines

    def tally(self) -> Tally:
        """The counts of all batches."""
        lines = self._lines
        kept = [line for line in lines if not line["dropped"]]
        return Tally(
            batches=lines[-1]["batch"] + 1 if lines else 0,
            rows=len(lines),
            sampled=sum(line["sampled"] for line in lines),
            kept={kind: sum(line["kind"] == kind for line in kept) for kind in KINDS},
            tokens=_by_kind(kept, "tokens"),
            finished=_by_kind(kept, "finished"),
            dropped=dict(Counter(line["dropped"] for line in lines if line["dropped"])),
        )

    def write_texts(self, folder: Path) -> list[Path]:
        """The kept samples of each kind as a text file, in order; a kind without any has none."""
        written = []
        for kind, name in TEXTS.items():
            lines = (line for line in self._lines if line["kind"] == kind and not line["dropped"])
            if texts := [line["text"] for line in lines]:
                with atomic_file(folder / name) as beside:
                    beside.write_bytes("".join(texts).encode("utf-8"))
                written.append(folder / name)
        return written


def is_synthesis(folder: Path) -> bool:
    """Whether a synthesis was begun in the folder."""
    return all((folder / name).is_file() for name in (SAMPLES, RECORD))


def finished(folder: Path) -> Path:
    """The samples of a synthesis; SupraError unless it is finished."""
    if read_object(folder / RECORD).get("finished") is not True:
        raise SupraError(f"{folder} holds an unfinished synthesis: run supra data synthesize again")
    return folder / SAMPLES


def open_folder(out: Path, settings: Mapping[str, Any], *, force: bool) -> bool:
    """Whether ``out`` holds a synthesis by these settings to resume; else it is emptied.

    SupraError when it holds something else, or, without ``force``, a synthesis by other settings.
    """
    with writing(out):
        if out.exists() and not out.is_dir():
            raise SupraError(f"{out} is a file: choose a folder that does not exist yet")
        if not out.exists() or not any(out.iterdir()):
            return False
        if not (out / RECORD).is_file():
            raise SupraError(f"{out} holds files but no {RECORD}: choose another folder")
    if force:
        # The record goes last: without it the rest would be refused.
        for name in (*TEXTS.values(), SAMPLES, RECORD):
            (out / name).unlink(missing_ok=True)
        return False
    before = read_object(out / RECORD).get("settings")
    if not isinstance(before, dict):
        raise FormatError(f"{out / RECORD} has no settings: {_ANEW}")
    for name, value in settings.items():
        if before.get(name) != value:
            raise SupraError(
                f"{out / RECORD} has {name} {before.get(name)}, not {value}: give the same again, "
                f"name another folder, or {_ANEW}"
            )
    return True


def _whole_batches(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of complete batches, and the bytes that they take."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found: list[dict[str, Any]] = []
    whole = length = count = 0
    for number, line in enumerate(lines, 1):
        try:
            value = parse(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict):
            if number < len(lines):
                raise FormatError(f"{path}, line {number} is damaged: {_ANEW}")
            break
        if not value.keys() >= _FIELDS or value["row"] != len(found) - whole:
            raise FormatError(f"{path}, line {number} is out of order: {_ANEW}")
        found.append(value)
        length += len(line)
        if value["row"] + 1 == value["rows"]:
            whole, count = number, length
    return found[:whole], count


def _by_kind(lines: list[dict[str, Any]], name: str) -> dict[str, int]:
    return {kind: sum(int(x[name]) for x in lines if x["kind"] == kind) for kind in KINDS}
