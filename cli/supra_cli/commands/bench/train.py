"""``supra bench train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A transformer, or a conversion.")],
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens a sequence; repeatable; default: 512.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Measured steps of each; the median counts.")] = 5,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="uptrain, transfer or distill; repeatable; default: uptrain."),
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="How a transformer is linearized; repeatable; default: windowed."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, more time; for all.")
    ] = False,
    segment_tokens: Annotated[
        int,
        typer.Option(help="Ours compute so many tokens of a row at a time; 0: all of them."),
    ] = 0,
    compile: Annotated[
        str, typer.Option(help="auto (on a GPU), always or never; for ours alone.")
    ] = "auto",
    out: options.ReportFolder = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Time training steps beside the original transformer's, in turns."""
    from supra_cli.commands.bench.output import check, show
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log

    require("torch", "measuring training")
    from supra_core.measure.tables import write
    from supra_torch.benchmark.train import benchmark, table

    check("train", out=out, force=force)

    def keep(measured: dict[str, Any]) -> None:
        """What is measured stays if a later length fails."""
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
