"""``supra state read``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    text: Annotated[Path, typer.Argument(help="The text to read, a UTF-8 file.")],
    out: Annotated[Path, typer.Argument(help="The file to write, .safetensors.")],
    system: options.System = None,
    backend: options.GenerationBackend = None,
    dtype: options.Dtype = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Read a text with a model once and save the state, for chats to start from."""
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_cli.shared.speech import check_text, load_speaker
    from supra_core.runtime.conversation import Conversation
    from supra_core.runtime.state_file import check_new_state
    from supra_core.text import read_text

    check_text(system, "--system")
    check_new_state(out, force)
    content = read_text(text)
    speaker = load_speaker(model, backend, dtype)
    conversation = Conversation(speaker.engine, system)
    start = time.monotonic()
    with ProgressReporter() as progress:
        tokens = conversation.read(content, progress)
    seconds = time.monotonic() - start
    speaker.save(conversation, out, force=force)
    record = {
        "model": model,
        "backend": speaker.engine.backend,
        "text": str(text),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "file": str(out),
        "file_bytes": out.stat().st_size,
    }
    if json_output:
        print_json(record)
        return
    log(
        f"{tokens:,} tokens read in {seconds:,.1f} s; {out} has "
        f"{out.stat().st_size / 2**20:,.1f} MiB. Ask with: supra chat {model} --state {out}"
    )
