"""``supra eval``."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_core.measure.scoring import Pair
    from supra_core.progress import Progress
    from supra_core.runtime.backend import Backend, Form
    from supra_core.text import EncodedText, ModelTokenizer

TASKS = ("perplexity", "lambada", "multiple_choice")
_METRICS = ("perplexity", "bits_per_byte", "nats_per_token")


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A text file for perplexity, .jsonl for the other tasks; repeatable."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="perplexity, lambada, multiple_choice (default: what the files are for), or "
            "tasks of the lm-eval harness by name."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use only this many tokens of a text, examples of a task.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows computed together.")] = 4,
    teacher: Annotated[
        str | None, typer.Option(help="Transformer to measure beside it; default: the one known.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure no teacher.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, mlx, reference or transformers.")
    ] = None,
    form: options.Form = "parallel",
    dtype: Annotated[
        str | None, typer.Option(help="Of both models' weights; default: float32.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON record here too, with versions and date.")
    ] = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Measure a model on texts and tasks, its teacher beside it."""
    from supra_cli.commands.verify import parse_form
    from supra_cli.shared.backends import default_for_evaluation
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_cli.shared.record import write_record
    from supra_core.errors import SupraError
    from supra_core.formats.atomic import check_new_file
    from supra_core.measure.perplexity import DTYPE
    from supra_core.sources.source import open_source
    from supra_core.sources.teacher import find_teacher

    start = time.monotonic()
    _check(limit, length, batch)
    name = backend or default_for_evaluation()
    chosen = parse_form(form)
    if no_teacher and teacher is not None:
        raise SupraError("--teacher and --no-teacher exclude each other: give one of them")
    if out is not None:
        if any(path.exists() and out.exists() and out.samefile(path) for path in data or ()):
            raise SupraError(f"--out {out} is one of the files of --data: name another one")
        check_new_file(out, force)
    harness = _harness_tasks(tasks)
    if harness and data:
        raise SupraError(
            f"--tasks {tasks} is none of {', '.join(TASKS)}, and the lm-eval harness has its own "
            "data: correct it, or leave out --data"
        )
    measurements = [] if harness else _measurements(tasks, data or [], limit)
    other = None if no_teacher else teacher or find_teacher(model)
    dtype = dtype or DTYPE
    sides = {"results": _Side(model, name, chosen, dtype)}
    if other is not None:
        # The teacher has no recurrent form of its own to compare with.
        sides["teacher"] = _Side(other, name, "parallel", dtype)
        if not open_source(other).spec.is_transformer:
            raise SupraError(f"{other} is no transformer: name the original with --teacher")
    elif not no_teacher and not open_source(model).spec.is_transformer:
        log(f"no teacher of {model} is known here: name it with --teacher, or give --no-teacher")
    plan = _Plan(limit, length, batch, sides["results"].tokenizer)
    # Whatever cannot be read or scored is noticed before anything is measured.
    for side in sides.values():
        side.check(measurements, plan)
    record: dict[str, Any] = {"data": [str(path) for path in data or []], "teacher": None}
    with ProgressReporter() as progress:
        for key, side in sides.items():
            label = "model" if key == "results" else key
            record[key] = (
                side.harness(harness, limit, progress, label) if harness
                else side.measured(measurements, plan, progress, label)
            )  # fmt: skip
    record["seconds"] = round(time.monotonic() - start, 1)
    if out is not None:
        write_record(out, record, replace=force)
    if json_output:
        print_json(record)
    else:
        _show(record)


@dataclass(frozen=True)
class _Plan:
    """``tokenizer``: the model's, whose tokens ``limit`` counts; a teacher reads the same text."""

    limit: int | None
    length: int
    batch: int
    tokenizer: ModelTokenizer
    _texts: dict[str, EncodedText] = field(default_factory=dict)

    def text(self, measurement: _Measurement) -> EncodedText:
        """The model's own tokens of a text, which are found once."""
        if measurement.name not in self._texts:
            text = self.tokenizer.encode(measurement.content)
            self._texts[measurement.name] = text if self.limit is None else text.head(self.limit)
        return self._texts[measurement.name]


@dataclass(frozen=True)
class _Measurement:
    """One task on one file; ``name`` is its key in the results, ``content`` what it holds."""

    name: str
    task: str
    path: Path
    content: Any


@dataclass(frozen=True)
class _Side:
    """One of the two models that are compared."""

    path: str
    backend: str
    form: Form
    dtype: str

    def check(self, measurements: Sequence[_Measurement], plan: _Plan) -> None:
        """Raise SupraError for a model that cannot be read, or asked what is to be measured."""
        from supra_core.errors import SupraError
        from supra_core.measure.perplexity import check_text
        from supra_core.measure.scoring import check_pairs
        from supra_core.sources.source import open_source

        spec, tokenizer = open_source(self.path).spec, self.tokenizer
        for measurement in measurements:
            try:
                if measurement.task == "perplexity":
                    check_text(_text(tokenizer, measurement, plan)[0], spec.vocab_size)
                else:
                    check_pairs(
                        _pairs(tokenizer, measurement),
                        spec.vocab_size,
                        spec.max_position_embeddings,
                    )
            except SupraError as error:
                raise SupraError(f"{measurement.path} with {self.path}: {error}") from None

    @cached_property
    def tokenizer(self) -> ModelTokenizer:
        from supra_core.sources.source import open_source

        return open_source(self.path).tokenizer()

    def measured(
        self, measurements: Sequence[_Measurement], plan: _Plan, progress: Progress, label: str
    ) -> dict[str, Any]:
        """The results by name."""
        from supra_core.runtime.backend import load

        loaded, tokenizer = load(self.backend, self.path, dtype=self.dtype), self.tokenizer
        results = {}
        for measurement in measurements:
            start = time.monotonic()
            stage = f"{label}: {measurement.name}"
            measure = _perplexity if measurement.task == "perplexity" else _task
            found = measure(loaded, tokenizer, measurement, plan, self.form, progress, stage)
            results[measurement.name] = {
                "model": self.path,
                "backend": self.backend,
                "form": self.form,
                "dtype": self.dtype,
                "data": str(measurement.path),
                **found,
                "seconds": round(time.monotonic() - start, 1),
            }
        return results

    def harness(
        self, tasks: Sequence[str], limit: int | None, progress: Progress, label: str
    ) -> dict[str, Any]:
        """The lm-eval harness's results by task."""
        from supra_core.runtime.backend import load
        from supra_torch.inference.lm_eval import evaluate

        loaded = load(self.backend, self.path, dtype=self.dtype)
        # Some of the harness's data sets print, which is not to end up in a record on stdout.
        with redirect_stdout(sys.stderr):
            found = evaluate(
                loaded, self.tokenizer, tasks, form=self.form, limit=limit, progress=progress,
                stage=f"{label}: {', '.join(tasks)}",
            )  # fmt: skip
        common = {
            "model": self.path, "backend": self.backend, "form": self.form, "dtype": self.dtype
        }  # fmt: skip
        return {name: {**common, **result} for name, result in found.items()}


def _check(limit: int | None, length: int, batch: int) -> None:
    from supra_core.errors import SupraError

    for option, value, least in (
        ("--limit", limit, 2),
        ("--length", length, 2),
        ("--batch", batch, 1),
    ):
        if value is not None and value < least:
            raise SupraError(f"{option} must be at least {least}, not {value}")


def _harness_tasks(tasks: str | None) -> list[str]:
    """The names, if they are the harness's and not ours; mixing is refused."""
    from supra_core.errors import SupraError

    names = tasks.split(",") if tasks else []
    foreign = [name for name in names if name not in TASKS]
    if foreign and len(foreign) < len(names):
        raise SupraError(
            f"--tasks {tasks} mixes tasks over files with tasks of the lm-eval harness "
            f"({', '.join(foreign)}): ask for them in two runs"
        )
    return foreign


def _measurements(tasks: str | None, data: Sequence[Path], limit: int | None) -> list[_Measurement]:
    """Which file is measured how, and read; every task asked for has a file, every file a task."""
    from supra_core.errors import SupraError
    from supra_core.measure.tasks import task_of

    if not data:
        raise SupraError("there is nothing to measure on: name a text or .jsonl file with --data")
    kinds = [task_of(path) for path in data]
    for path, kind in zip(data, kinds, strict=True):
        if tasks is not None and kind not in tasks.split(","):
            raise SupraError(f"{path} is a file for {kind}, which --tasks {tasks} does not name")
    for task in tasks.split(",") if tasks else ():
        if task not in kinds:
            raise SupraError(f"task {task} has no file: name one with --data")
    measurements = [
        _Measurement(
            kind if kinds.count(kind) == 1 else f"{kind}:{path.stem}",
            kind,
            path,
            _content(kind, path, limit),
        )
        for path, kind in zip(data, kinds, strict=True)
    ]
    names = [measurement.name for measurement in measurements]
    for name in names:
        if names.count(name) > 1:
            raise SupraError(f"two files of --data would both be {name}: rename one of them")
    return measurements


def _content(task: str, path: Path, limit: int | None) -> Any:
    from supra_core.measure.tasks import read_passages, read_questions
    from supra_core.text import read_text

    if task == "perplexity":
        return read_text(path)
    return (read_passages if task == "lambada" else read_questions)(path, limit)


def _perplexity(
    model: Backend,
    tokenizer: ModelTokenizer,
    measurement: _Measurement,
    plan: _Plan,
    form: Form,
    progress: Progress,
    stage: str,
) -> dict[str, Any]:
    from supra_core.measure.perplexity import beyond_positions, perplexity

    text, alike = _text(tokenizer, measurement, plan)
    found = asdict(
        perplexity(
            model,
            text,
            length=plan.length,
            batch=plan.batch,
            form=form,
            progress=progress,
            stage=stage,
        )  # fmt: skip
    )
    metrics = {name: found.pop(name) for name in _METRICS}
    beyond = beyond_positions(model.spec, min(plan.length, len(text.ids)))
    return {"metrics": metrics, **found, **({} if alike else {"same_tokens": False}), **beyond}


def _text(
    tokenizer: ModelTokenizer, measurement: _Measurement, plan: _Plan
) -> tuple[EncodedText, bool]:
    """The tokens to be measured, and whether they are those of the model's own tokenizer."""
    text = plan.text(measurement)
    return (text, True) if tokenizer is plan.tokenizer else tokenizer.same_stretch(text)


def _pairs(tokenizer: ModelTokenizer, measurement: _Measurement) -> list[Pair]:
    from supra_core.measure.tasks import passage_pairs, question_pairs

    encode = passage_pairs if measurement.task == "lambada" else question_pairs
    pairs: list[Pair] = encode(tokenizer, measurement.content)
    return pairs


def _task(
    model: Backend,
    tokenizer: ModelTokenizer,
    measurement: _Measurement,
    plan: _Plan,
    form: Form,
    progress: Progress,
    stage: str,
) -> dict[str, Any]:
    from supra_core.measure.tasks import lambada, multiple_choice

    given: dict[str, Any] = {
        "form": form,
        "max_length": model.spec.max_position_embeddings,
        "progress": progress,
        "stage": stage,
    }
    measure = lambada if measurement.task == "lambada" else multiple_choice
    found = measure(model, tokenizer, measurement.content, **given)
    result = {"metrics": found.metrics, "examples": found.examples, "text_form": found.text_form}
    return result | ({"cut_prompts": found.cut_prompts} if found.cut_prompts else {})


def _show(record: dict[str, Any]) -> None:
    from supra_cli.shared.output import log, print_table

    teacher = record["teacher"] or {}
    rows, notes = [], []
    for name, result in record["results"].items():
        beside = teacher.get(name, {"metrics": {}})["metrics"]
        for metric, value in result["metrics"].items():
            error = result["metrics"].get(f"{metric}_stderr")
            if not metric.endswith("_stderr"):
                rows.append((name, metric, _figure(value, error), _figure(beside.get(metric))))
        notes.append(f"{name}: {_conditions(result)}")
        if not teacher.get(name, {}).get("same_tokens", True):
            notes.append(
                f"{name}: the teacher's tokenizer divides the text into other tokens; both read "
                "the same characters, and only bits per byte compare"
            )
        for label, found in (("model", result), ("teacher", teacher.get(name, {}))):
            if "beyond_positions" in found:
                notes.append(
                    f"{name}: the {label} is a transformer of {found['beyond_positions']:,} "
                    "positions, and the windows are longer: give a smaller --length"
                )
            if "cut_prompts" in found:
                notes.append(
                    f"{name}: {found['cut_prompts']:,} prompts are longer than the positions of "
                    f"the {label}, which did not read their beginning"
                )
    columns = ("", "metric", "model", "teacher")
    width = 4 if teacher else 3
    print_table([row[:width] for row in rows], columns=columns[:width])
    for line in notes:
        log(line)


def _figure(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    shown = f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return shown if error is None else f"{shown} ± {error:.4f}"


def _conditions(result: dict[str, Any]) -> str:
    if "length" in result:
        return (
            f"{result['tokens']:,} tokens in windows of {result['length']}, stride "
            f"{result['stride']}, {result['form']} form; text {result['text_form']}"
        )
    examples = f"{result['examples']:,} examples, {result['form']} form"
    return f"{examples}; {result['text_form']}" if "text_form" in result else examples
