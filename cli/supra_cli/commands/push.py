"""``supra push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options
from supra_cli.shared.output import print_json


def command(
    folder: Annotated[Path, typer.Argument(help="A model's folder, as convert writes it.")],
    model: Annotated[str, typer.Argument(help="Hub id, org/name.")],
    private: options.Private = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also upload this file of the folder; repeatable."),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Put a model's folder on the hub in one commit: the files that its SHA256SUMS lists."""
    from supra_cli.shared import pushing
    from supra_core.hub import check_folder

    check_folder(folder)
    done = pushing.push(folder, pushing.target(model), private, include or ())
    if json_output:
        print_json(done)
