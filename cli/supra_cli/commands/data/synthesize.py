"""``supra data synthesize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(help="The transformer: anything supra convert reads.")],
    out: Annotated[Path, typer.Argument(help="Folder for the text; supra uptrain --data OUT.")],
    tokens: Annotated[int, typer.Option(help="Tokens of text to generate, at least.")] = 1_000_000,
    conversations: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of tokens in conversations; default: 0.5 with a chat template, else 0.",
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Upper limit of tokens in a sample.")] = 512,
    batch: Annotated[int, typer.Option(help="Samples generated together.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="Above 1: more varied text than the model's own.")
    ] = 1.0,
    top_p: options.TopP = 0.95,
    seed: Annotated[int, typer.Option(help="Repeatable sampling.")] = 0,
    turns: Annotated[int, typer.Option(help="Upper limit of questions in a conversation.")] = 3,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Generate training text with a transformer. Run again to resume."""
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter

    require("torch", "sampling text")
    from supra_cli.synthesis import synthesize
    from supra_core.data.synthesis.settings import Settings

    settings = Settings(
        tokens, conversations, length, batch, temperature, top_p, seed, turns, dtype
    )
    with ProgressReporter() as progress:
        record = synthesize(model, out, settings, force=force, progress=progress)
    if json_output:
        print_json(record)
        return
    counts = record["counts"]
    log(
        f"{sum(counts['tokens'].values()):,} tokens in {sum(counts['kept'].values()):,} samples, "
        f"{sum(counts['dropped'].values()):,} dropped: supra uptrain MODEL --data {out} --out RUN"
    )
