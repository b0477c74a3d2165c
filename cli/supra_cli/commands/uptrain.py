"""``supra uptrain``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    start: Annotated[
        str, typer.Argument(metavar="CONFIG.toml|MODEL", help="Settings of a run, or a model.")
    ],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe: a name or a .toml file; default: windowed.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[:SHARE]",
            help="Text that supra data prepare reads, or its output; repeatable, each with "
            "its share of the tokens.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default: runs/ plus the name of the config.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Train the converted model to match its transformer. Run again to resume."""
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.errors import SupraError

    require("torch", "uptraining")
    from supra_torch.distributed.processes import is_first
    from supra_torch.recipes.config import resolve
    from supra_torch.uptrain.run import uptrain

    is_config = start.endswith(".toml")
    if out is None and not is_config:
        raise SupraError("uptraining a model needs --out: name a folder for the run")
    config = resolve(
        config=Path(start) if is_config else None,
        model=None if is_config else start,
        recipe=recipe,
        data=data[0] if data and len(data) == 1 else data or None,
        overrides=options.overrides(settings or []),
    )
    if data and len(data) == 1 and not os.path.exists(data[0]):
        from supra_torch.recipes.config import DataPart

        if DataPart.parse(data[0]).share is not None:
            raise SupraError(f"--data {data[0]}: a share needs a second --data")
    folder = out or Path("runs") / Path(start).stem
    with ProgressReporter() as progress:
        summary = uptrain(config, folder, progress=progress, say=log)
    if not is_first():
        return
    if json_output:
        print_json({"run": str(folder), "model": str(folder / "model"), **summary})
    else:
        log(f"done. Measure it: supra eval {folder} --tasks perplexity --data FILE")
