"""``supra bench context``."""

from __future__ import annotations

from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Anything supra convert reads.")],
    against: Annotated[
        str, typer.Option(help="The transformer, of a family that mlx-lm supports.")
    ],
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Context length in tokens; repeatable; default: 0, 2048, 16384 and 65536."
        ),
    ] = None,
    read_up_to: Annotated[int, typer.Option(help="Longest context for the transformer.")] = 16_384,
    steps: Annotated[int, typer.Option(help="Measured steps; the median is reported.")] = 40,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: options.ReportFolder = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Time prefill and decode in MLX at growing contexts, beside the transformer."""
    from supra_cli.commands.bench.output import show
    from supra_cli.shared.output import log
    from supra_core.measure.tables import refuse_existing
    from supra_core.runtime.backend import importing

    with importing("mlx", "measuring by context"):
        from supra_mlx.benchmark import benchmark, device_name, table

    if out is not None:
        refuse_existing(out, "context", device_name(), force)
    result = benchmark(
        model, against, contexts=sorted(context or (0, 2048, 16_384, 65_536)),
        read_up_to=read_up_to, steps=steps, dtype=dtype, log=log,
    )  # fmt: skip
    show("context", result, table(result), out=out, force=force, json_output=json_output)
