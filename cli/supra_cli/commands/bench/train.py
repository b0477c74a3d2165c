"""``supra bench train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from supra_cli.shared import options


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A transformer, or a converted model.")
    ],
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens per sequence; repeatable; default: 512.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Measured steps of each; the median is reported.")] = 5,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="Stage: uptrain, transfer or distill; repeatable; default: uptrain."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="Recipe that linearizes a transformer; repeatable; default: windowed."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing",
            help="Recompute activations in backward: less memory, more time.",
        ),
    ] = False,
    segment_tokens: Annotated[
        int,
        typer.Option(help="Tokens of a row that our model computes at a time; 0: all."),
    ] = 0,
    compile: Annotated[
        str, typer.Option(help="Compile our model: auto (on a GPU), always or never.")
    ] = "auto",
    out: options.ReportFolder = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Time training steps, in alternation with those of the transformer."""
    from supra_cli.commands.bench.output import check, show
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log

    require("torch", "measuring training")
    from supra_core.measure.tables import write
    from supra_torch.benchmark.train import benchmark, table

    check("train", out=out, force=force)

    def keep(measured: dict[str, Any]) -> None:
        """Keep what is measured if a later length fails."""
        if out is not None:
            write(out, "train", measured, table(measured), force=True)

    result = benchmark(
        model,
        recipes=recipe,
        kinds=kind or ["uptrain"],
        lengths=length or [512],
        batch_tokens=batch_tokens,
        steps=steps,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        segment_tokens=segment_tokens,
        compile=compile,
        log=log,
        keep=keep,
    )
    show("train", result, table(result), out=out, force=True, json_output=json_output)
