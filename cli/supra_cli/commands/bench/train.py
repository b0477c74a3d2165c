"""``supra bench train``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from supra_cli import options


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
        typer.Option(help="How a transformer is linearized; repeatable; default: aligned."),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, bf16 or float32.")] = "auto",
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory, more time; for all.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Time training steps beside the original transformer's, in turns."""
    from supra_cli.backends import require
    from supra_cli.output import log, print_json, print_table

    require("torch", "measuring training")
    from supra_torch.benchmark.train import benchmark

    result = benchmark(
        model,
        recipes=recipe,
        kinds=kind or ["uptrain"],
        lengths=length or [512],
        batch_tokens=batch_tokens,
        steps=steps,
        precision=precision,
        activation_checkpointing=activation_checkpointing,
        log=log,
    )
    if json_output:
        print_json(result)
        return
    print_table(_rows(result), columns=_COLUMNS, title=_title(result))
    for note in result["notes"]:
        log(note)


_COLUMNS = (
    "training step", "length", "tokens/s", "seconds: median", "least", "most", "peak memory",
    "against the original",
)  # fmt: skip


def _rows(result: dict[str, Any]) -> list[list[str]]:
    from supra_cli.output import bytes_text

    return [
        [
            row["name"],
            str(row["length"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds_median']:.2f}",
            f"{row['seconds_least']:.2f}",
            f"{row['seconds_most']:.2f}",
            bytes_text(row["peak_memory_bytes"]),
            "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f} x",
        ]
        for row in result["rows"]
    ]


def _title(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['model']}: {result['batch_tokens']} tokens a step, {result['precision']}, "
        f"{result['device']}, {result['date']}; {versions}"
    )
