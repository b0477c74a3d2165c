"""The folder that synthesis writes: samples a batch at a time, and the texts made of them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from supra_core.data.synthesis.rows import KINDS, Kind, Sample
from supra_core.errors import FormatError, SupraError
from supra_core.formats.atomic import atomic_file, writing
from supra_core.formats.jsonfile import parse, read_object

SAMPLES, RECORD = "samples.jsonl", "synthesis.json"
_FIELDS = {"batch", "row", "rows", *(field.name for field in fields(Sample))}
TEXTS: dict[Kind, str] = {"document": "documents.txt", "conversation": "conversations.txt"}


@dataclass(frozen=True)
class Tally:
    """What has been sampled so far; ``tokens`` are those of samples that are kept, by kind."""

    batches: int
    rows: int
    sampled: int
    kept: Mapping[str, int]
    tokens: Mapping[str, int]
    finished: Mapping[str, int]
    dropped: Mapping[str, int]

    @property
    def total(self) -> int:
        """Tokens of all samples that are kept."""
        return sum(self.tokens.values())


class SampleStore:
    """The samples of whole batches in ``folder``/samples.jsonl, one JSON object a line.

    What a killed run left of a batch is dropped on opening. Raises FormatError when a line in the
    middle is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAMPLES
        self._lines, length = _whole_batches(self.path)
        if self.path.exists() and self.path.stat().st_size > length:
            os.truncate(self.path, length)

    def append(self, batch: int, samples: Sequence[Sample]) -> None:
        """All samples of a batch; on disk on return."""
        lines = [
            {"kind": sample.kind, "batch": batch, "row": row, "rows": len(samples)}
            | {name: value for name, value in asdict(sample).items() if name != "kind"}
            for row, sample in enumerate(samples)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SupraError(f"{self.path} could not be written: {error}") from error
        self._lines += lines

    def tally(self) -> Tally:
        """The counts of all batches."""
        lines = self._lines
        kept = [line for line in lines if not line["dropped"]]
        return Tally(
            batches=lines[-1]["batch"] + 1 if lines else 0,
            rows=len(lines),
            sampled=sum(line["sampled"] for line in lines),
            kept=_by_kind(kept, lambda line: 1),
            tokens=_by_kind(kept, lambda line: int(line["tokens"])),
            finished=_by_kind(kept, lambda line: int(line["finished"])),
            dropped=dict(Counter(line["dropped"] for line in lines if line["dropped"])),
        )

    def write_texts(self, folder: Path) -> list[Path]:
        """The kept samples of each kind as a text file, in order; a kind without any has none."""
        written = []
        for kind, name in TEXTS.items():
            texts = [line["text"] for line in self._lines if _is_kept(line, kind)]
            if texts:
                with atomic_file(folder / name) as beside:
                    beside.write_bytes("".join(texts).encode("utf-8"))
                written.append(folder / name)
        return written


def is_synthesis(folder: Path) -> bool:
    """Whether a synthesis was begun in the folder."""
    return all((folder / name).is_file() for name in (SAMPLES, RECORD))


def finished(folder: Path) -> Path:
    """The samples of a synthesis; SupraError while more of them are to come."""
    if read_object(folder / RECORD).get("finished") is not True:
        raise SupraError(
            f"{folder} holds a synthesis that has not ended: run supra data synthesize again"
        )
    return folder / SAMPLES


def open_folder(out: Path, settings: Mapping[str, Any], *, force: bool) -> bool:
    """Whether ``out`` holds a synthesis by these settings to go on with; else it is made empty.

    Raises SupraError when it holds something else, or a synthesis by other settings and ``force``
    is not given.
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
    _same_settings(out / RECORD, settings)
    return True


def _same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    before = read_object(path).get("settings")
    if not isinstance(before, dict):
        raise FormatError(f"{path} has no settings: begin anew with `force`")
    for name, value in settings.items():
        if before.get(name) != value:
            raise SupraError(
                f"{path} was begun with {name} {before.get(name)}, not {value}: give the same "
                "again, another folder, or `force` to begin anew"
            )


def _whole_batches(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of complete batches, and the bytes that they take."""
    if not path.exists():
        return [], 0
    lines: list[dict[str, Any]] = []
    whole = length = count = 0
    for number, (raw, line) in enumerate(_parsed(path)):
        if line is None:
            break
        if not line.keys() >= _FIELDS or line["row"] != number - whole:
            raise FormatError(f"{path}, line {number + 1} is out of order: begin anew with `force`")
        lines.append(line)
        length += raw
        if line["row"] + 1 == line["rows"]:
            whole, count = number + 1, length
    return lines[:whole], count


def _parsed(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Each line's bytes and object; None for a last line that is torn."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            value = parse(line) if line.endswith(b"\n") else None
        except ValueError:
            value = None
        if not isinstance(value, dict) and number < len(lines):
            raise FormatError(f"{path}, line {number} is damaged: begin anew with `force`")
        yield len(line), value if isinstance(value, dict) else None


def _is_kept(line: Mapping[str, Any], kind: str) -> bool:
    return line["kind"] == kind and not line["dropped"]


def _by_kind(
    lines: Iterable[Mapping[str, Any]], count: Callable[[Mapping[str, Any]], int]
) -> dict[str, int]:
    counts = dict.fromkeys(KINDS, 0)
    for line in lines:
        counts[line["kind"]] += count(line)
    return {str(kind): value for kind, value in counts.items()}
