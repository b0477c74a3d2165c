"""Every registered task: it runs on a tiny model, gives JSON, prints, and refuses bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from supra_core.errors import SupraError
from supra_core.measure.tasks import TASKS, Options, Subject, Task, task_named, tasks_of
from supra_core.progress import silent
from supra_core.text import ModelTokenizer
from tests.tiny_models import SPECS, reference
from tests.tiny_tokenizers import byte_level

TEXT = "The ferry leaves at nine. It carries sheep and the post, and returns by noon. " * 12
# The fields of every task over examples.
EXAMPLE = {
    "context": "The ferry leaves at", "continuation": "nine",
    "query": "When?\n", "choices": ["at nine", "by noon", "never"], "gold": 0,
}  # fmt: skip
OPTIONS = Options(limit=2, length=16, distances=(40, 80), longest=64)


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return ModelTokenizer(byte_level())


def _spec(tokenizer: ModelTokenizer, **fields: Any) -> Any:
    size = tokenizer.raw.get_vocab_size()
    given = {"vocab_size": size, "max_position_embeddings": 400, **fields}
    return replace(SPECS["sink"], **given)


def _file(task: Task, folder: Path) -> Path | None:
    """A good file for the task."""
    if task.reads == "nothing":
        return None
    path = folder / ("text.txt" if task.reads == "text" else f"{task.name}.jsonl")
    path.write_text(TEXT if task.reads == "text" else json.dumps(EXAMPLE) + "\n")
    return path


def _options(task: Task) -> Options:
    return replace(OPTIONS, limit=100) if task.reads == "text" else OPTIONS


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_prints_and_is_recorded(
    name: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    task = task_named(name)
    path = _file(task, tmp_path)
    assert task.name == name and (path is None or task in tasks_of(path))
    options = _options(task)
    spec, told = _spec(tokenizer), []
    model: Any = reference(spec)
    measure = task.prepared(task.read(path, options.limit), Subject(spec, tokenizer), options)
    record = measure(model, lambda stage, done, total, **_: told.append((done, total)), name)
    assert told[-1][0] == told[-1][1] > 0
    assert json.loads(json.dumps(record, allow_nan=False)).keys() == record.keys()
    assert record["metrics"]
    assert all(type(value) is float for value in record["metrics"].values())
    assert task.conditions({"form": "parallel", **record})
    # The same again: whatever is drawn, is drawn by the seed.
    assert measure(model, silent, name) == record


@pytest.mark.parametrize("name", TASKS)
def test_a_task_refuses_what_a_model_cannot_be_asked(
    name: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    """Before any weight is loaded."""
    task = task_named(name)
    path = _file(task, tmp_path)
    content = task.read(path)
    few = Subject(_spec(tokenizer, vocab_size=40), tokenizer)
    with pytest.raises(SupraError, match="vocabulary|usable tokens"):
        task.prepared(content, few, _options(task))
    if task.reads != "text":
        short = Subject(_spec(tokenizer, max_position_embeddings=3), tokenizer)
        with pytest.raises(SupraError, match="positions|does not fit"):
            task.prepared(content, short, OPTIONS)
    else:
        with pytest.raises(SupraError, match="at least .* tokens: choose a longer one"):
            task.prepared("x", Subject(_spec(tokenizer), tokenizer), OPTIONS)
    if task.reads == "nothing":
        with pytest.raises(SupraError, match="no token for the text ''"):
            task.prepared("", Subject(_spec(tokenizer), tokenizer), OPTIONS)
    with pytest.raises(SupraError, match="absent"):
        task.read(tmp_path / "absent.jsonl")
    if path is not None and task.reads == "jsonl":
        path.write_text(json.dumps(dict.fromkeys(EXAMPLE, "")))
        with pytest.raises(SupraError, match="line 1: field"):
            task.read(path)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SupraError, match="'needles' is unknown: use one of perplexity, .*recall"):
        task_named("needles")


def test_distances_are_found_where_the_memory_is(tokenizer: ModelTokenizer) -> None:
    """Metrics by distance are those of the list, named by their distance."""
    spec = _spec(tokenizer)
    task = task_named("copying")
    measure = task.prepared(TEXT, Subject(spec, tokenizer), OPTIONS)
    record = measure(reference(spec), silent, "")  # type: ignore[arg-type]
    assert [one["distance"] for one in record["distances"]] == [40, 80]
    for one in record["distances"]:
        assert record["metrics"][f"among@{one['distance']}"] == one["among"]
        assert record["metrics"][f"greedy@{one['distance']}"] == one["greedy"]
    assert math.isclose(record["by_chance"], sum(1 / n for n in range(2, 15)) / 13)
