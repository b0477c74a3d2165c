"""``supra bench decode``."""

from __future__ import annotations

from typing import Annotated

import typer

from supra_cli.shared import options

EXIT_CHECK_FAILED = 1


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Anything supra convert reads.")],
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size; repeatable; default: 1.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Measured steps; the median is reported.")] = 50,
    dtype: options.Dtype = None,
    out: options.ReportFolder = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Time decode steps: eager, and with static buffers (a CUDA graph on a GPU)."""
    from supra_cli.commands.bench.output import check, show
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log

    require("torch", "measuring decode steps")
    from supra_torch.benchmark.decode import benchmark, table

    check("decode", out=out, force=force)
    result = benchmark(model, batches=batch or [1], steps=steps, dtype=dtype, log=log)
    show("decode", result, table(result), out=out, force=force, json_output=json_output)
    if any(row["failed"] for row in result["rows"]):
        raise typer.Exit(EXIT_CHECK_FAILED)
