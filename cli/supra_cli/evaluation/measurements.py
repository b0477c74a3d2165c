"""Which task is measured on which file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_core.errors import SupraError
from supra_core.measure.tasks import Task, task_named, tasks_of


@dataclass(frozen=True)
class Measurement:
    """A task and what it reads: a file, or what it generates. ``name``: its key in the results."""

    name: str
    task: Task
    path: Path | None
    content: Any


def measurements(
    names: Sequence[str], data: Sequence[Path], limit: int | None
) -> list[Measurement]:
    """Every named task on the files that it takes, or without names each file's own task.

    SupraError for a name that is unknown, a task without a file, and a file without a task.
    """
    wanted = [task_named(name) for name in names]
    pairs: list[tuple[Task, Path | None]] = []
    for path in data:
        takes = tasks_of(path)
        chosen = [task for task in takes if task in wanted] if wanted else takes[:1]
        if not chosen:
            raise SupraError(
                f"{path} is a file for {takes[0].name}, which --tasks {','.join(names)} does not "
                "name"
            )
        pairs += [(task, path) for task in chosen]
    for task in wanted:
        if all(task is not other for other, _ in pairs):
            if task.reads != "nothing":
                raise SupraError(f"task {task.name} has no file: name one with --data")
            pairs.append((task, None))
    if not pairs:
        raise SupraError("there is nothing to measure on: name a text or .jsonl file with --data")
    tasks = [task for task, _ in pairs]
    found = [
        Measurement(
            task.name if tasks.count(task) == 1 or path is None else f"{task.name}:{path.stem}",
            task, path, task.read(path, limit),
        )
        for task, path in pairs
    ]  # fmt: skip
    refuse_repeated([one.name for one in found])
    return found


def refuse_repeated(names: Sequence[str]) -> None:
    """SupraError for two files that would have the same name in the results."""
    for name in names:
        if names.count(name) > 1:
            raise SupraError(f"two files of --data would both be {name}: rename one of them")
