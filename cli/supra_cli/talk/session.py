"""What a chat is between its lines: a conversation, settings, named branches, commands."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from supra_cli.output import log
from supra_cli.speech import Speaker
from supra_core.conversation import Conversation
from supra_core.errors import SupraError
from supra_core.generate import Sampling
from supra_core.progress import Progress, silent
from supra_core.text import read_text

MAIN = "main"


class Left(Exception):
    """The user wants to leave."""


@dataclass
class Pace:
    """Of the last answer: its tokens, and the seconds from the first of them to the last."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None for an answer too short to tell."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Session:
    """One chat; lines that begin with a slash are commands, all others questions."""

    def __init__(
        self,
        speaker: Speaker,
        sampling: Sampling,
        *,
        system: str | None = None,
        stop: Sequence[str] = (),
        progress: Progress = silent,
    ) -> None:
        self.speaker, self.sampling, self.stop = speaker, sampling, tuple(stop)
        self.progress, self.pace = progress, Pace()
        self._attached = ""
        self._branch = MAIN
        self._branches: dict[str, Conversation] = {}
        self.conversation = Conversation(speaker.engine, system)

    def answer(self, line: str) -> Generator[str] | None:
        """The answer to a line, piece by piece; None for a command that says nothing.

        Raises SupraError for what cannot be done, Left when the chat ends.
        """
        if not line.startswith("/"):
            question = f"{self._attached}\n\n{line}" if self._attached else line
            self._attached = ""
            return self._timed(question)
        name, _, rest = line[1:].partition(" ")
        if name in ("exit", "quit", "bye"):
            raise Left
        if name not in COMMANDS:
            raise SupraError(f"there is no /{name}: /help lists what there is")
        return COMMANDS[name].run(self, rest.strip())

    def status(self) -> str:
        """The memory, what it has seen, and how fast it spoke."""
        tokens = len(self.conversation.tokens)
        parts = [
            f"{self.speaker.sizes.memory_bytes(tokens) / 2**20:,.1f} MiB of state",
            f"{tokens:,} tokens seen",
        ]
        if self.pace.tokens_per_second is not None:
            parts.append(f"{self.pace.tokens_per_second:,.1f} tokens/s")
        if self._branch != MAIN:
            parts.append(f"branch {self._branch}")
        return ", ".join(parts)

    def _turns(self) -> str:
        turns = self.conversation.turns
        return f"{turns} turn" if turns == 1 else f"{turns} turns"

    def _timed(self, question: str) -> Generator[str]:
        self.pace, began = Pace(), 0.0
        said = self.conversation.reply(
            question, self.sampling, stop=self.stop, progress=self.progress
        )
        with closing(said) as pieces:
            for piece in pieces:
                began = began or time.monotonic()
                self.pace = Pace(self.conversation.said, time.monotonic() - began)
                yield piece

    def help(self, rest: str) -> None:
        """these lines"""
        width = max(len(one.usage) for one in COMMANDS.values())
        log("\n".join(f"{one.usage:{width}}  {one.help}" for one in COMMANDS.values()))
        log(f"{'/exit':{width}}  leave (so does Ctrl-D); Ctrl-C stops the answer")
        log('"""         begins and ends a question of several lines')

    def clear(self, rest: str) -> None:
        """forget the conversation; a system prompt and a text that was read stay"""
        self.conversation.clear()
        log("The conversation starts anew.")

    def system(self, rest: str) -> None:
        """start anew with this system prompt"""
        self.conversation = Conversation(self.speaker.engine, rest or None)
        log("The conversation starts anew with that system prompt.")

    def save(self, rest: str) -> None:
        """write the state and the transcript to a file (--force replaces one)"""
        words = _words(rest)
        path = Path(_one([word for word in words if word != "--force"], "/save FILE")).expanduser()
        self.speaker.save(self.conversation, path, force="--force" in words)
        log(f"{path} has {self.status()}.")

    def load(self, rest: str) -> None:
        """go on from such a file"""
        path = Path(_one(_words(rest), "/load FILE")).expanduser()
        self.speaker.load(self.conversation, path)
        log(f"{path}: {self._turns()}, {self.status()}.")

    def undo(self, rest: str) -> None:
        """take the last turn back"""
        question = self.conversation.undo()
        if question is None:
            raise SupraError("there is no turn to take back")
        log(f"Taken back: {question.splitlines()[0][:60]}")

    def regen(self, rest: str) -> Generator[str]:
        """answer the last question again"""
        question = self.conversation.undo()
        if question is None:
            raise SupraError("there is no question to answer again")
        return self._timed(question)

    def branch(self, rest: str) -> None:
        """go to the branch of that name, or begin it here; without one, list them"""
        if not rest:
            names = [*self._branches, self._branch]
            log(", ".join(f"{n} (here)" if n == self._branch else n for n in sorted(names)))
            return
        if rest == self._branch:
            raise SupraError(f"this is {rest} already")
        self._branches[self._branch] = self.conversation
        known = rest in self._branches
        self.conversation = self._branches.pop(rest) if known else self.conversation.branch()
        self._branch = rest
        log(f"{rest}: {self._turns()}.")

    def read(self, rest: str) -> None:
        """show the model a text: at once before the first turn, else with the next question"""
        path = Path(_one(_words(rest), "/read FILE")).expanduser()
        text = read_text(path)
        if self.conversation.turns:
            self._attached = text
            log(f"{path} goes with your next question.")
            return
        tokens = self.conversation.read(text, self.progress)
        log(f"{path}: {tokens:,} tokens read.")

    def set(self, rest: str) -> None:
        """change temperature, top_p, min_p, repetition_penalty, max_tokens, seed or stop"""
        name, _, value = rest.partition(" ")
        if name == "stop":
            self.stop = tuple(_words(value))
        elif name:
            self.sampling = _changed(self.sampling, name, value.strip())
        shown = [f"{field.name} {getattr(self.sampling, field.name)}" for field in fields(Sampling)]
        log(", ".join([*shown, f"stop {shlex.join(self.stop)}" if self.stop else "stop none"]))

    def stats(self, rest: str) -> None:
        """the state's size, tokens seen, speed"""
        turn = f"last turn: {self.conversation.fed:,} tokens fed, {self.conversation.said:,} said"
        log(f"{self.status()}; {self._turns()}; {turn}")


@dataclass(frozen=True)
class Command:
    """A method of :class:`Session`, and how it is typed."""

    usage: str
    run: Callable[[Session, str], Generator[str] | None]

    @property
    def help(self) -> str:
        """The method's own line."""
        return self.run.__doc__ or ""


COMMANDS: dict[str, Command] = {
    "help": Command("/help", Session.help),
    "clear": Command("/clear", Session.clear),
    "system": Command("/system TEXT", Session.system),
    "read": Command("/read FILE", Session.read),
    "undo": Command("/undo", Session.undo),
    "regen": Command("/regen", Session.regen),
    "branch": Command("/branch NAME", Session.branch),
    "save": Command("/save FILE", Session.save),
    "load": Command("/load FILE", Session.load),
    "set": Command("/set NAME VALUE", Session.set),
    "stats": Command("/stats", Session.stats),
}


def questions(lines: Iterator[str]) -> Iterator[str]:
    """Lines without the empty ones; those between two triple quotation marks are one."""
    for line in lines:
        text = line.strip()
        if text.startswith('"""'):
            block = [text[3:]]
            while not block[-1].rstrip().endswith('"""'):
                following = next(lines, None)
                if following is None:
                    break
                block.append(following.rstrip("\n"))
            text = "\n".join(block).rstrip().removesuffix('"""').strip()
        if text:
            yield text


def _words(text: str) -> list[str]:
    """As a shell takes them, quotation marks and all."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SupraError(f"{text} cannot be read ({error}): close or escape it") from None


def _one(words: Sequence[str], usage: str) -> str:
    if len(words) != 1:
        raise SupraError(f"name one file: {usage}")
    return words[0]


def _changed(sampling: Sampling, name: str, value: str) -> Sampling:
    names = [field.name for field in fields(Sampling)]
    if name == "seed" and value in ("", "none"):
        return replace(sampling, seed=None)
    if name not in names:
        raise SupraError(f"there is no setting {name}: choose from {', '.join(names)}, stop")
    try:
        number: Any = int(value) if name in ("seed", "max_tokens") else float(value)
    except ValueError:
        raise SupraError(f"{name} takes a number, not '{value}'") from None
    return replace(sampling, **{name: number})
