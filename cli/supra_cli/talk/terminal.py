"""Reading questions and showing answers, on a terminal or through pipes."""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from supra_cli.shared.output import log, write_piece
from supra_cli.talk.session import COMMANDS, Line, Questions
from supra_core.visible import visible

if TYPE_CHECKING:
    from prompt_toolkit.history import History

_APP = "supra"
_PATIENCE = 1.0
_SECONDS_BETWEEN_LINES = 5.0


def on_terminal() -> bool:
    """Whether stdin is a terminal; a process may have no stdin at all."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_lines(toolbar: Callable[[], str]) -> Iterator[Line]:
    """Questions and commands until Ctrl-D or the end of stdin; ``toolbar`` is the line below."""
    together = Questions()
    return together.of(_typed(toolbar, together) if on_terminal() else _piped())


def show(pieces: Generator[str]) -> None:
    """Print an answer as it is generated, as markdown on a terminal. Ctrl-C ends it."""
    try:
        if sys.stdout.isatty():
            _as_markdown(pieces)
        else:
            for piece in pieces:
                write_piece(piece)
    except KeyboardInterrupt:
        # Only the answer ends; its text so far stays in the conversation.
        print(" [stopped]", end="")
    finally:
        pieces.close()
    print(flush=True)


class ReadingProgress:
    """A :class:`~supra_core.progress.Progress` that shows itself after a second."""

    def __init__(self) -> None:
        # Infinite, so that the first call starts the clock.
        self._done, self._began, self._shown = math.inf, 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int, **metrics: float) -> None:
        """``done`` of ``total`` tokens."""
        now = time.monotonic()
        if done <= self._done:
            self._began = self._shown = now
        self._done = math.inf if done >= total else done
        if not sys.stderr.isatty():
            if now - self._shown > _SECONDS_BETWEEN_LINES:
                self._shown = now
                log(f"{stage} {done:,} of {total:,} tokens")
        elif now - self._began > _PATIENCE:
            line = f"{visible(stage)} {done:,} of {total:,} tokens" if done < total else ""
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def _as_markdown(pieces: Generator[str]) -> None:
    from rich.console import Console

    from supra_cli.talk.markdown import MarkdownStream

    with MarkdownStream(Console()) as stream:
        for piece in pieces:
            stream.write(piece)


def _piped() -> Iterator[str]:
    if sys.stdin is None:
        return
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Neither an invalid byte nor a byte order mark ends the conversation.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    yield from sys.stdin


def _typed(toolbar: Callable[[], str], together: Questions) -> Iterator[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter

    names = WordCompleter([f"/{name}" for name in (*COMMANDS, "exit")], sentence=True)
    session: PromptSession[str] = PromptSession(
        history=_history(),
        auto_suggest=AutoSuggestFromHistory(),
        completer=names,
        complete_while_typing=False,
        bottom_toolbar=toolbar,
    )
    while True:
        try:
            yield session.prompt(". " if together.inside else "> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            if together.inside:
                yield Questions.DROPPED
            else:
                print("Ctrl-D or /exit leaves")


def _history() -> History:
    """History in a file that only the user can read; in memory if it cannot be written."""
    import typer
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(typer.get_app_dir(_APP)) / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        path.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
