"""``supra eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli import options

if TYPE_CHECKING:
    from supra_core.backend import Form
    from supra_core.progress import Progress
    from supra_core.text import EncodedText

TASKS = ("perplexity",)
_METRICS = ("perplexity", "bits_per_byte", "nats_per_token")


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    data: Annotated[Path, typer.Option(help="A text file, UTF-8.")],
    tasks: Annotated[str, typer.Option(help="So far: perplexity.")] = "perplexity",
    limit: Annotated[int | None, typer.Option(help="Use only this many tokens.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows computed together.")] = 4,
    teacher: Annotated[
        str | None, typer.Option(help="Transformer to measure beside it; default: the one known.")
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure no teacher.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, mlx, reference or transformers.")
    ] = None,
    form: options.Form = "parallel",
    dtype: options.Dtype = None,
    json_output: options.Json = False,
) -> None:
    """Measure a model on a text, its teacher beside it."""
    from supra_cli.backends import default_for_evaluation
    from supra_cli.commands.verify import parse_form
    from supra_cli.output import print_json
    from supra_cli.progress import ProgressReporter
    from supra_core.errors import SupraError
    from supra_core.teacher import find_teacher

    _check(tasks, limit, length, batch)
    name = backend or default_for_evaluation()
    chosen = parse_form(form)
    text = _encoded(model, data, limit)
    if no_teacher and teacher is not None:
        raise SupraError("--teacher and --no-teacher exclude each other: give one of them")
    other = None if no_teacher else teacher or find_teacher(model)
    with ProgressReporter() as progress:
        result = _measure(model, text, name, chosen, dtype, length, batch, progress, "model")
        beside = None
        if other is not None:
            # The teacher has no recurrent form of its own to compare with.
            beside = _measure(
                other, text, name, "parallel", dtype, length, batch, progress, "teacher"
            )
    if json_output:
        print_json(
            {
                "data": str(data),
                "results": {"perplexity": result},
                "teacher": None if beside is None else {"perplexity": beside},
            }
        )
    else:
        _show(result, beside)


def _check(tasks: str, limit: int | None, length: int, batch: int) -> None:
    from supra_core.errors import SupraError

    for task in tasks.split(","):
        if task not in TASKS:
            raise SupraError(f"task '{task}' is unknown: use one of {', '.join(TASKS)}")
    for option, value, least in (
        ("--limit", limit, 2),
        ("--length", length, 2),
        ("--batch", batch, 1),
    ):
        if value is not None and value < least:
            raise SupraError(f"{option} must be at least {least}, not {value}")


def _encoded(model: str, data: Path, limit: int | None) -> EncodedText:
    from supra_core.sources import open_source
    from supra_core.text import encode, load_tokenizer, read_text

    text = read_text(data)
    encoded = encode(load_tokenizer(open_source(model).assets(), model), text)
    return encoded if limit is None else encoded.head(limit)


def _measure(
    path: str,
    text: EncodedText,
    backend: str,
    form: Form,
    dtype: str | None,
    length: int,
    batch: int,
    progress: Progress,
    stage: str,
) -> dict[str, Any]:
    from supra_core.backend import load
    from supra_core.evaluate import perplexity

    loaded = load(backend, path, dtype=dtype)
    found = asdict(
        perplexity(
            loaded, text, length=length, batch=batch, form=form, progress=progress, stage=stage
        )
    )
    metrics = {name: found.pop(name) for name in _METRICS}
    return {"model": path, "backend": backend, "form": form, "metrics": metrics, **found}


def _show(result: dict[str, Any], teacher: dict[str, Any] | None) -> None:
    from supra_cli.output import log, print_table

    rows = []
    for who, measured in (("model", result), ("teacher", teacher)):
        if measured is not None:
            metrics = measured["metrics"]
            rows.append(
                (
                    f"{who} {measured['model']}",
                    f"{metrics['perplexity']:.2f}",
                    f"{metrics['bits_per_byte']:.3f}",
                    f"{metrics['nats_per_token']:.4f}",
                )
            )
    print_table(rows, columns=("", "perplexity", "bits/byte", "nats/token"))
    log(
        f"{result['tokens']:,} tokens in windows of {result['length']}, stride "
        f"{result['stride']}, {result['form']} form; text {result['text_form']}"
    )
