"""``supra chat``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from supra_cli import options

if TYPE_CHECKING:
    from supra_cli.speech import Speaker

HELP = """\
/help    these lines
/clear   forget the conversation
/exit    leave (so does Ctrl-D)
Ctrl-C   stops the answer; the conversation goes on"""


def command(
    model: Annotated[str, typer.Argument(help="Anything supra convert reads.")],
    backend: options.GenerationBackend = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = 512,
    seed: options.Seed = None,
    system: options.System = None,
    dtype: options.Dtype = None,
) -> None:
    """Talk to a model; lines come from a terminal or from stdin."""
    from supra_cli.output import log
    from supra_cli.speech import load_speaker
    from supra_core.backend import default_for_generation
    from supra_core.generate import Sampling

    name = backend or default_for_generation()
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    speaker = load_speaker(model, name, sampling, system, dtype)
    if sys.stdin.isatty():
        log(f"{model} in {name}. /help lists what else there is.")
    for line in _lines():
        if line.startswith("/"):
            if not _obey(line, speaker):
                return
        elif line:
            _answer(speaker, line)


def _lines() -> Iterator[str]:
    """What the user types, line by line, until Ctrl-D or the end of stdin."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            # One wrong byte in a line must not end the conversation.
            sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        for line in sys.stdin:
            yield line.strip()
        return
    import readline  # noqa: F401  # importing it gives input() line editing and a history

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\nCtrl-D or /exit leaves")


def _obey(line: str, speaker: Speaker) -> bool:
    """Carry out a command; False when it ends the chat."""
    from supra_cli.output import log

    if line in ("/exit", "/quit"):
        return False
    if line == "/clear":
        speaker.clear()
        log("The conversation starts anew.")
    elif line == "/help":
        log(HELP)
    else:
        log(f"There is no {line.split()[0]}; /help lists what there is.")
    return True


def _answer(speaker: Speaker, line: str) -> None:
    with closing(speaker.reply(line)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            # Only the answer ends: what has been said stays in the conversation.
            print(" [stopped]", end="")
    print(flush=True)
