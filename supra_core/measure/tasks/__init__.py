"""Tasks: each is an object in a file of its own, registered here."""

from __future__ import annotations

from pathlib import Path

from supra_core.data.documents import refuse_records
from supra_core.errors import FormatError, SupraError
from supra_core.measure.tasks.copying import Copying
from supra_core.measure.tasks.examples import ExampleTask, objects
from supra_core.measure.tasks.lambada import Lambada
from supra_core.measure.tasks.multiple_choice import MultipleChoice
from supra_core.measure.tasks.permutations import Permutations
from supra_core.measure.tasks.perplexity import Perplexity
from supra_core.measure.tasks.positions import Positions
from supra_core.measure.tasks.recall import Recall
from supra_core.measure.tasks.task import Measure, Options, Record, Subject, Task

__all__ = ["TASKS", "Measure", "Options", "Record", "Subject", "Task", "task_named", "tasks_of"]

# Of several tasks that read a file, the first is the one it is for unless another is named.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Perplexity(), Lambada(), MultipleChoice(), Positions(), Permutations(), Copying(), Recall(),
    )
}  # fmt: skip


def task_named(name: str) -> Task:
    """SupraError with the known names for one that is not registered."""
    if name not in TASKS:
        raise SupraError(f"task '{name}' is unknown: use one of {', '.join(TASKS)}")
    return TASKS[name]


def tasks_of(path: Path) -> list[Task]:
    """The tasks that take a file: those of a text, or those whose fields its first line has."""
    if path.suffix.lower() != ".jsonl":
        refuse_records(path)
        return [task for task in TASKS.values() if task.reads != "jsonl"]
    examples = [task for task in TASKS.values() if isinstance(task, ExampleTask)]
    _, first = objects(path, 1)[0]
    if found := [task for task in examples if first.keys() >= set(task.fields)]:
        return list(found)
    needed = dict.fromkeys(" and ".join(task.fields) for task in examples)
    raise FormatError(
        f"{path}: its first line has the fields {', '.join(first)}: a task needs "
        f"{', or '.join(needed)}"
    )
