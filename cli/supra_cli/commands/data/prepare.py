"""``supra data prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files (.txt, .json, .jsonl, .csv, .parquet, .tar, compressed too), folders of "
            "them, hub:ORG/NAME.",
        ),
    ],
    model: Annotated[str, typer.Option("--tokenizer", help="Model whose tokenizer to use.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards; supra uptrain --data OUT.")],
    field: Annotated[
        str | None,
        typer.Option(help="Field of a record; default: text, messages, or another known field."),
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a data set on the hub.")] = "train",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip records that cannot be read.")
    ] = False,
    parse_markers: options.ParseMarkers = False,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens per shard; the document that reaches them is the last.")
    ] = 100_000_000,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Tokenise documents into shards for training. Run again to resume."""
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.data.documents import in_words
    from supra_core.data.prepare import Settings, prepare
    from supra_core.families import needs_bos
    from supra_core.sources.source import open_source

    source = open_source(model)
    ends = source.spec.eos_token_id
    settings = Settings(
        sources=tuple(sources),
        separator=ends[0] if ends else None,
        vocab_size=source.spec.vocab_size,
        field=field,
        split=split,
        skip_bad=skip_bad,
        parse_markers=parse_markers,
        needs_bos=needs_bos(source.spec),
        shard_tokens=shard_tokens,
    )
    with ProgressReporter() as progress:
        store = prepare(settings, source.assets(), out, where=model, force=force, progress=progress)
    index = store.index
    if json_output:
        print_json({"out": str(out), **index})
        return
    for problem in index["skipped_first"]:
        log(f"skipped: {problem}")
    more = index["skipped"] - len(index["skipped_first"])
    if more > 0:
        log(f"skipped: {more:,} more")
    if index["left_out"]:
        log(f"not read: {in_words(index['left_out'])}")
    log(
        f"{index['tokens']:,} tokens in {index['documents']:,} documents: "
        f"supra uptrain {model} --data {out} --out RUN"
    )
