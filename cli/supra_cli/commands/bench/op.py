"""``supra bench op``."""

from __future__ import annotations

from typing import Annotated

import typer

from supra_cli.shared import options

EXIT_CHECK_FAILED = 1


def command(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Name of a shape; repeatable; default: all, or the small ones on a CPU."),
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            help="triton, chunked, fla-retention, fla-simple-gla or sdpa; repeatable; default: all."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    repeats: Annotated[
        int | None, typer.Option(help="Measured calls; the median is reported.", min=1)
    ] = None,
    out: options.ReportFolder = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Check linear attention against float64, then time it beside other implementations."""
    from supra_cli.commands.bench.output import check, show
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log

    require("torch", "measuring the operator")
    from supra_torch.benchmark.operator import benchmark, table

    check("operator", out=out, force=force, device=device)
    result = benchmark(
        shapes=shape, implementations=implementation, dtype=dtype, device=device, repeats=repeats,
        log=log,
    )  # fmt: skip
    show("operator", result, table(result), out=out, force=force, json_output=json_output)
    if any(row["failed"] for row in result["rows"]):
        raise typer.Exit(EXIT_CHECK_FAILED)
