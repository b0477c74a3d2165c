"""``supra eval``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_cli.evaluation.measurements import Measurement


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A text or .jsonl file to measure on; repeatable."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of supra (perplexity, lambada, multiple_choice, positions, permutations, "
            "copying, recall) or of the lm-eval harness. Default: the first task for each file."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Use only this many tokens of a text, examples or sequences of a task."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window of text.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows computed together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of generated sequences and orders.")] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(help="Transformer to compare with; default: the one that MODEL names."),
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure no teacher.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, mlx, reference or transformers.")
    ] = None,
    form: options.Form = "parallel",
    dtype: Annotated[
        str | None, typer.Option(help="Type that both models compute in; default: float32.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the JSON record here too, with versions and date.")
    ] = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Measure a model on texts and tasks, its teacher beside it."""
    from supra_cli.commands.verify import parse_form
    from supra_cli.evaluation.harness import harness_results, harness_tasks
    from supra_cli.evaluation.measurements import measurements
    from supra_cli.evaluation.sides import measured, open_sides
    from supra_cli.shared.output import print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_cli.shared.record import write_record
    from supra_core.errors import SupraError
    from supra_core.formats.atomic import check_new_file
    from supra_core.measure.tasks import Options

    start = time.monotonic()
    asked = Options(limit, length, batch, seed)
    if out is not None:
        if any(path.exists() and out.exists() and out.samefile(path) for path in data or ()):
            raise SupraError(f"--out {out} is one of the files of --data: name another one")
        check_new_file(out, force)
    names = tasks.split(",") if tasks else []
    harness = harness_tasks(names, data or ())
    items = [] if harness else measurements(names, data or (), limit)
    sides = open_sides(
        model, teacher=teacher, no_teacher=no_teacher, backend=backend, form=parse_form(form),
        dtype=dtype,
    )  # fmt: skip
    # Whatever cannot be read or scored is noticed before anything is measured.
    prepared = [[side.prepared(item, asked) for item in items] for side in sides]
    record: dict[str, Any] = {"data": [str(path) for path in data or []], "teacher": None}
    with ProgressReporter() as progress:
        for key, side, ready in zip(("results", "teacher"), sides, prepared, strict=False):
            record[key] = (
                harness_results(side, harness, limit, progress) if harness
                else measured(side, items, ready, progress)
            )  # fmt: skip
    record["seconds"] = round(time.monotonic() - start, 1)
    if out is not None:
        write_record(out, record, replace=force)
    if json_output:
        print_json(record)
    else:
        _show(record, items)


def _show(record: dict[str, Any], items: Sequence[Measurement]) -> None:
    from supra_cli.evaluation.figures import notes
    from supra_cli.shared.output import log, print_table

    tasks = {item.name: item.task for item in items}
    teacher = record["teacher"] or {}
    rows, said = [], []
    for name, result in record["results"].items():
        beside = teacher.get(name, {"metrics": {}})
        for metric, value in result["metrics"].items():
            error = result["metrics"].get(f"{metric}_stderr")
            if not metric.endswith("_stderr"):
                other = _figure(beside["metrics"].get(metric))
                rows.append((name, metric, _figure(value, error), other))
        conditions = (
            tasks[name].conditions(result) if name in tasks
            else f"{result['examples']:,} examples, {result['form']} form"
        )  # fmt: skip
        said += [f"{name}: {conditions}", *notes(name, "model", result)]
        said += notes(name, "teacher", beside)
    columns = ("", "metric", "model", "teacher")
    width = 4 if teacher else 3
    print_table([row[:width] for row in rows], columns=columns[:width])
    log(*said)


def _figure(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    shown = f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return shown if error is None else f"{shown} ± {error:.4f}"
