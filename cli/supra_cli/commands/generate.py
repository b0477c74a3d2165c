"""``supra generate``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from supra_cli import options


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    prompt: Annotated[str, typer.Argument(help="What to answer, or to continue with --raw.")],
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False,
    backend: options.GenerationBackend = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = 256,
    seed: options.Seed = None,
    system: options.System = None,
    dtype: options.Dtype = None,
    json_output: options.Json = False,
) -> None:
    """Print a model's answer, or the continuation of a text."""
    from supra_cli.output import print_json
    from supra_cli.speech import load_speaker
    from supra_core.backend import default_for_generation
    from supra_core.errors import SupraError
    from supra_core.generate import Sampling

    if raw and system is not None:
        raise SupraError("--system needs the chat template: leave out --raw or --system")
    if not prompt.isascii() and prompt != prompt.encode("utf-8", "replace").decode("utf-8"):
        raise SupraError("the prompt is not UTF-8 text: give it in that encoding")
    name = backend or default_for_generation()
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    speaker = load_speaker(model, name, sampling, system, dtype)
    start = time.monotonic()
    pieces = speaker.continuation(prompt) if raw else speaker.reply(prompt)
    if json_output:
        text = "".join(pieces)
        seconds = round(time.monotonic() - start, 3)
        print_json(
            {"model": model, "backend": name, "prompt": prompt, "text": text, "seconds": seconds}
        )
        return
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
