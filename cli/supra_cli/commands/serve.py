"""``supra serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options

_GIB = 2**30


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="SUPRA_API_KEY", help="Key that clients must send; default: none."),
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one key a line. Each key is a client; clients share the server fairly.",
        ),
    ] = None,
    share_states: Annotated[
        bool,
        typer.Option(
            "--share-states",
            help="Let clients reuse states of each other's prompts. A client can then tell how "
            "other prompts begin.",
        ),
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients; default: the folder's name.")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: a state from /save or supra state read, served as MODEL:NAME. "
            "May be repeated."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Web origin that may use the server, such as http://localhost:3000; * allows "
            "any. May be repeated; default: none."
        ),
    ] = None,
    parse_markers: options.ParseMarkers = False,
    backend: options.GenerationBackend = None,
    dtype: options.Dtype = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_tokens: Annotated[
        int,
        typer.Option(help="Upper limit of a request's max_tokens (512 where it has none)."),
    ] = 4096,
    max_prompt: Annotated[int, typer.Option(help="Maximum prompt length in tokens.")] = 262_144,
    parallel: Annotated[int, typer.Option(help="Answers generated at a time.")] = 16,
    waiting: Annotated[
        int, typer.Option(help="Requests that may wait; further ones get 429.")
    ] = 64,
    keep_gib: Annotated[
        float, typer.Option(help="GiB of memory for states of earlier prompts.")
    ] = 1.0,
) -> None:
    """Serve a model over HTTP with OpenAI's interface: chat completions, completions, models.

    Sampling options are the defaults of requests that set none.
    """
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log

    require("starlette", "supra serve", extra="serve")
    require("uvicorn", "supra serve", extra="serve")
    from supra_cli.serving.server import Settings, serve
    from supra_cli.serving.service import Limits
    from supra_core.errors import SupraError
    from supra_core.runtime.sampling import Sampling
    from supra_core.runtime.scheduler import Broken

    for option, value, least in (
        ("--max-tokens", max_tokens, 1), ("--max-prompt", max_prompt, 1),
        ("--parallel", parallel, 1), ("--waiting", waiting, 0),
    ):  # fmt: skip
        if value < least:
            raise SupraError(f"{option} must be at least {least}, not {value}")
    if not 0 <= keep_gib < 1e9:
        raise SupraError(f"--keep-gib must be at least 0 and below 1e9, not {keep_gib:g}")
    if api_key == "":
        raise SupraError("--api-key is empty: give a key, or omit it")
    keys = ([] if api_key is None else [api_key]) + ([] if api_keys is None else _keys(api_keys))
    try:
        serve(
            Settings(
                model=model,
                backend=backend,
                dtype=dtype,
                name=name or Path(model).resolve().name.removesuffix(".gguf"),
                host=host,
                port=port,
                keys=list(dict.fromkeys(keys)),
                sampling=Sampling(temperature, top_p, 1, None, min_p, repetition_penalty),
                limits=Limits(max_prompt, max_tokens),
                parallel=parallel,
                waiting=waiting,
                kept_bytes=int(keep_gib * _GIB),
                contexts=_contexts(context or []),
                origins=tuple(map(_origin, allow_origin or [])),
                parse_markers=parse_markers,
                share_states=share_states,
            )
        )
    except Broken as error:
        # The input was right: exit code 1, not 2.
        log(f"supra: error: {error}")
        raise typer.Exit(1) from None


def _keys(path: Path) -> list[str]:
    """The non-empty lines of a file; SupraError if there are none."""
    from supra_core.errors import SupraError
    from supra_core.text.plain import read_text

    keys = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not keys:
        raise SupraError(f"{path} has no keys: write one on each line")
    return keys


def _origin(text: str) -> str:
    """The origin as browsers send it; SupraError for anything else."""
    from urllib.parse import urlsplit

    from supra_core.errors import SupraError

    if text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text)
        named = f"{parts.scheme}://{parts.netloc}" if parts.netloc else None
    except ValueError:
        named = None
    if named != text or text != text.lower() or "@" in text:
        raise SupraError(
            f"--allow-origin '{text}' is not an origin: write it like http://localhost:3000, "
            "without a path"
        )
    return text


def _contexts(given: list[str]) -> dict[str, Path]:
    """State files by name; SupraError for anything but NAME=FILE."""
    from supra_core.errors import SupraError

    contexts: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not name or not equals or not path:
            raise SupraError(f"--context '{text}' is not NAME=FILE: write it like book=book.state")
        if name in contexts:
            raise SupraError(f"--context has the name {name} twice: use different names")
        contexts[name] = Path(path)
    return contexts
