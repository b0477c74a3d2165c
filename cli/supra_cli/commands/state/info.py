"""``supra state info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from supra_cli.shared import options


def command(
    file: Annotated[Path, typer.Argument(help="A file written by /save or supra state read.")],
    json_output: options.Json = False,
) -> None:
    """Show the model, the size and the transcript of a saved state."""
    from supra_cli.shared.output import print_json, say
    from supra_core.runtime.state_file import read_state

    saved = read_state(file)
    if json_output:
        print_json(
            {
                "file": str(file),
                "model": saved.owner.source,
                "fingerprint": saved.owner.model,
                "backend": saved.owner.backend,
                "dtype": saved.owner.dtype,
                "began": None if saved.began is None else saved.began.isoformat(),
                "tokens": len(saved.tokens),
                "state_bytes": saved.state_bytes,
                "messages": list(saved.messages),
            }
        )
        return
    say(f"{saved.owner.source} in {saved.owner.backend}, {saved.owner.dtype}")
    if saved.began is not None:
        say(f"begun {saved.began:%Y-%m-%d %H:%M}")
    say(f"{saved.state_bytes / 2**20:,.1f} MiB of state, {len(saved.tokens):,} tokens seen")
    for message in saved.messages:
        first, *more = _shortened(message["content"]).split("\n")
        # Further lines are indented: they cannot look like a message of their own.
        say("", f"{message['role']}: {first}", *(f"  {line}" if line else "" for line in more))


def _shortened(text: str, characters: int = 400) -> str:
    cut = len(text) - characters
    return text if cut <= 0 else f"{text[:characters]} ... ({cut:,} characters more)"
