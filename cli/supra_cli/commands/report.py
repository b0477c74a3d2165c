"""``supra report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(help="A run, or anything supra convert reads.")],
    out: Annotated[Path, typer.Option(help="The page; its JSON record goes beside it.")] = Path(
        "report.html"
    ),
    data: Annotated[
        list[Path] | None,
        typer.Option(help="A text or .jsonl file as in eval; repeatable. Default: Python's docs."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Transformer to compare with; default: the one that MODEL names."),
    ] = None,
    no_teacher: Annotated[bool, typer.Option("--no-teacher", help="Measure no teacher.")] = False,
    limit: Annotated[
        int | None, typer.Option(help="Use only this many tokens of a text, examples of a task.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few tokens, examples and samples everywhere.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="torch, mlx, reference or transformers.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the probes and samples.")] = 0,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Measure a model beside its teacher, as one HTML page."""
    from supra_cli.report_card.report import write_report
    from supra_cli.report_card.settings import ReportSettings
    from supra_cli.report_card.summary import show
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter

    settings = ReportSettings(
        model=model, out=out, data=tuple(data or ()), teacher=teacher, no_teacher=no_teacher,
        limit=limit, quick=quick, backend=backend, seed=seed, force=force,
    )  # fmt: skip
    with ProgressReporter() as progress:
        record = write_report(settings, progress)
    if json_output:
        print_json(record)
    else:
        show(record)
    log(f"Written: {settings.out} and {settings.record_path}")
