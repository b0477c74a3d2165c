"""``supra generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    prompt: Annotated[
        str, typer.Argument(help="Message to answer, or with --raw text to continue.")
    ],
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the chat template.")] = False,
    backend: options.GenerationBackend = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    max_tokens: options.MaxTokens = 256,
    seed: options.Seed = None,
    stop: options.Stop = None,
    system: options.System = None,
    state: options.State = None,
    parse_markers: options.ParseMarkers = False,
    dtype: options.Dtype = None,
    json_output: options.Json = False,
) -> None:
    """Print the model's answer to a message, or the continuation of a text."""
    from supra_cli.shared.output import print_json, write_piece
    from supra_cli.shared.speech import check_text, load_speaker
    from supra_core.errors import SupraError
    from supra_core.runtime.sampling import Sampling

    if raw and system is not None:
        raise SupraError("--system needs the chat template: omit --raw or --system")
    check_text(prompt, "the prompt")
    check_text(system, "--system")
    if state is not None and (raw or system is not None):
        raise SupraError("--state continues a conversation: omit --raw and --system")
    sampling = Sampling(temperature, top_p, max_tokens, seed, min_p, repetition_penalty)
    speaker = load_speaker(model, backend, dtype, state=state, parse_markers=parse_markers)
    start = time.monotonic()
    pieces: Iterator[str]
    if raw:
        pieces = speaker.continuation(prompt, sampling, stop or ())
    else:
        conversation = speaker.conversation(system)
        pieces = conversation.reply(prompt, sampling, stop=stop or ())
    if json_output:
        text = "".join(pieces)
        seconds = round(time.monotonic() - start, 3)
        record = {"model": model, "backend": speaker.engine.backend, "prompt": prompt}
        print_json({**record, "text": text, "seconds": seconds})
        return
    for piece in pieces:
        write_piece(piece)
    write_piece("\n")
