"""The state of a chat: a conversation, settings, named branches, and the slash commands."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from supra_cli.shared.output import log
from supra_cli.shared.speech import Speaker
from supra_core.errors import FormatError, SupraError
from supra_core.progress import Progress, silent
from supra_core.runtime.conversation import Conversation
from supra_core.runtime.sampling import Sampling
from supra_core.text import read_text

MAIN = "main"


class ChatEnded(Exception):
    """The user ended the chat."""


@dataclass
class Pace:
    """Tokens of the last answer, and seconds from its first token to its last."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None for an answer of fewer than two tokens."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


class Line(NamedTuple):
    """A typed line; ``verbatim``: never a command."""

    text: str
    verbatim: bool = False


@dataclass
class Branch:
    """A conversation, and texts to send with its next question."""

    conversation: Conversation
    attached: list[str] = field(default_factory=list)


class Session:
    """One chat: lines that begin with a slash are commands, all others are questions."""

    def __init__(
        self,
        speaker: Speaker,
        sampling: Sampling,
        conversation: Conversation | None = None,
        *,
        stop: Sequence[str] = (),
        progress: Progress = silent,
    ) -> None:
        self.speaker, self.sampling, self.stop = speaker, sampling, tuple(stop)
        self.progress, self.pace = progress, Pace()
        self._here = Branch(conversation or Conversation(speaker.engine))
        self._name = MAIN
        self._others: dict[str, Branch] = {}

    @property
    def conversation(self) -> Conversation:
        """The branch that the chat is on."""
        return self._here.conversation

    def answer(self, line: Line | str) -> Generator[str] | None:
        """The answer to a line, piece by piece; None for a command without an answer.

        Raises SupraError for a command that fails, ChatEnded when the user leaves.
        """
        text, verbatim = (line, False) if isinstance(line, str) else line
        if verbatim or not text.startswith("/"):
            return self._asked(text)
        name, *following = text[1:].split(maxsplit=1) or [""]
        rest = following[0] if following else ""
        if name not in COMMANDS and name not in _LEAVING:
            raise SupraError(
                f'there is no command /{name}: see /help; between two """ a question may begin '
                "with a slash"
            )
        if rest and (name in _LEAVING or not COMMANDS[name].takes_more):
            raise SupraError(f"/{name} takes no argument: omit {rest}")
        if name in _LEAVING:
            raise ChatEnded
        return COMMANDS[name].run(self, rest.strip())

    def status(self) -> str:
        """Memory of the state, tokens seen, and speed of the last answer."""
        tokens = len(self.conversation.tokens)
        parts = [
            f"{self.speaker.sizes.memory_bytes(tokens) / 2**20:,.1f} MiB of state",
            f"{tokens:,} tokens seen",
        ]
        if self.pace.tokens_per_second is not None:
            parts.append(f"{self.pace.tokens_per_second:,.1f} tokens/s")
        if self._name != MAIN:
            parts.append(f"branch {self._name}")
        return ", ".join(parts)

    def _asked(self, text: str) -> Generator[str]:
        """The answer to a question and its attached texts, which stay if nothing was generated."""
        attached = self._here.attached
        with closing(self._timed("\n\n".join([*attached, text]))) as pieces:
            for piece in pieces:
                attached.clear()
                yield piece
        attached.clear()

    def _timed(self, question: str) -> Generator[str]:
        self.pace, began = Pace(), 0.0
        said = self.conversation.reply(
            question, self.sampling, stop=self.stop, progress=self.progress
        )
        with closing(said) as pieces:
            for piece in pieces:
                began = began or time.monotonic()
                self.pace = Pace(self.conversation.generated_tokens, time.monotonic() - began)
                yield piece

    def _begin(self, conversation: Conversation, message: str) -> None:
        """Replace this branch's conversation."""
        if self._here.attached:
            message += " Texts read for the next question are dropped."
        self._here = Branch(conversation)
        log(message)

    def help(self, rest: str) -> None:
        """show this help"""
        width = max(len(one.usage) for one in COMMANDS.values())
        log(*(f"{one.usage:{width}}  {one.help}" for one in COMMANDS.values()))
        log(f"{'/exit':{width}}  leave (so does Ctrl-D); Ctrl-C stops the answer")
        log('"""         starts and ends a question of several lines')

    def clear(self, rest: str) -> None:
        """start again; the system prompt and the text read at the start stay"""
        self.conversation.clear()
        self._begin(self.conversation, "Started a new conversation.")

    def system(self, rest: str) -> None:
        """start again with this system prompt"""
        prompt = "that system prompt" if rest else "the template's own system prompt"
        fresh = Conversation(self.speaker.engine, rest or None)
        self._begin(fresh, f"Started a new conversation with {prompt}.")

    def save(self, rest: str) -> None:
        """save the conversation to a file (--force replaces one)"""
        force, names = _options(_words(rest), "--force")
        path = _path(names, "/save FILE")
        self.speaker.save(self.conversation, path, force=force)
        log(f"Saved {path}: {self.status()}.")

    def load(self, rest: str) -> None:
        """load a saved conversation"""
        path = _path(_words(rest), "/load FILE")
        loaded = self.speaker.loaded(path)
        self._begin(loaded, f"Loaded {path}: {_turns(loaded)}, {len(loaded.tokens):,} tokens seen.")

    def undo(self, rest: str) -> None:
        """remove the last turn"""
        question = self.conversation.undo()
        if question is None:
            raise SupraError("there is no turn to undo")
        log(f"Removed: {(question.splitlines() or [''])[0][:60]}")

    def regen(self, rest: str) -> Generator[str]:
        """generate the last answer again"""
        before = self.conversation.branch()
        question = self.conversation.undo()
        if question is None:
            raise SupraError("there is no question to answer again")
        return self._again(question, before)

    def _again(self, question: str, before: Conversation) -> Generator[str]:
        try:
            yield from self._timed(question)
        finally:
            if self.conversation.turns < before.turns:
                # Stopped before its first word: the old answer stays.
                self._here.conversation = before

    def branch(self, rest: str) -> None:
        """go to a branch, or start one here; without NAME, list them"""
        if not rest:
            names = sorted([*self._others, self._name])
            log(", ".join(f"{n} (here)" if n == self._name else n for n in names))
            return
        if rest == self._name:
            raise SupraError(f"the chat is already on branch {rest}")
        known = self._others.pop(rest, None)
        self._others[self._name] = self._here
        self._here = known or Branch(self.conversation.branch(), list(self._here.attached))
        self._name = rest
        log(f"{rest}: {_turns(self.conversation)}.")

    def read(self, rest: str) -> None:
        """read a text: at once before the first turn, else with the next question"""
        path = _path(_words(rest), "/read FILE")
        text = read_text(path)
        if not self.conversation.turns:
            try:
                tokens = self.conversation.read(text, self.progress)
            except FormatError:
                log("The chat template has no place for a text before the first question.")
            else:
                log(f"Read {path}: {tokens:,} tokens.")
                return
        self._here.attached.append(text)
        log(f"{path} will be sent with your next question.")

    def set(self, rest: str) -> None:
        """change temperature, top_p, min_p, repetition_penalty, max_tokens, seed or stop"""
        name, _, value = rest.partition(" ")
        if name == "stop":
            self.stop = tuple(_words(value))
        elif name:
            self.sampling = _changed(self.sampling, name, value.strip())
        shown = [
            f"{setting.name} {getattr(self.sampling, setting.name)}" for setting in fields(Sampling)
        ]
        log(", ".join([*shown, f"stop {shlex.join(self.stop)}" if self.stop else "stop none"]))

    def stats(self, rest: str) -> None:
        """show memory, tokens and speed"""
        talk = self.conversation
        turn = f"last turn: {talk.prompt_tokens:,} prompt, {talk.generated_tokens:,} generated"
        log(f"{self.status()}; {_turns(self.conversation)}; {turn}")


@dataclass(frozen=True)
class Command:
    """A method of :class:`Session`, and its usage."""

    usage: str
    run: Callable[[Session, str], Generator[str] | None]

    @property
    def help(self) -> str:
        """The method's docstring."""
        return self.run.__doc__ or ""

    @property
    def takes_more(self) -> bool:
        """Whether it takes an argument."""
        return " " in self.usage


_QUOTES = '"""'

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


_LEAVING = ("exit", "quit", "bye")


class Questions:
    """Joins typed lines: those between two triple quotation marks are one question.

    ``inside``: whether such a block is open. The line DROPPED discards it.
    """

    DROPPED = "\x03"

    def __init__(self) -> None:
        self.inside = False

    def of(self, lines: Iterator[str]) -> Iterator[Line]:
        """The questions and commands in ``lines``, without empty ones."""
        for line in lines:
            text = line.strip()
            if not text.startswith(_QUOTES):
                if text and text != self.DROPPED:
                    yield Line(text)
                continue
            block = self._block(text[len(_QUOTES) :], lines)
            if block:
                yield Line(block, verbatim=True)

    def _block(self, first: str, lines: Iterator[str]) -> str:
        block, self.inside = [first], True
        while not block[-1].rstrip().endswith(_QUOTES):
            following = next(lines, None)
            if following is None:
                break
            if following == self.DROPPED:
                block = []
                break
            block.append(following.rstrip("\r\n"))
        self.inside = False
        return "\n".join(block).rstrip().removesuffix(_QUOTES).strip()


def _turns(conversation: Conversation) -> str:
    turns = conversation.turns
    return f"{turns} turn" if turns == 1 else f"{turns} turns"


def _words(text: str) -> list[str]:
    """Words as a shell splits them, with quotation marks."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SupraError(
            f"{text} cannot be split into words ({error}): put the name in double quotation marks"
        ) from None


def _options(words: Sequence[str], option: str) -> tuple[bool, list[str]]:
    """Whether the option is given, and the other words."""
    unknown = [word for word in words if word.startswith("--") and word != option]
    if unknown:
        raise SupraError(f"unknown option {unknown[0]}: the only option is {option}")
    return option in words, [word for word in words if word != option]


def _path(words: Sequence[str], usage: str) -> Path:
    if len(words) != 1:
        raise SupraError(f"give one file: {usage}")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError as error:
        raise SupraError(f"cannot resolve {words[0]} ({error}): write the full path") from None


def _changed(sampling: Sampling, name: str, value: str) -> Sampling:
    names = [setting.name for setting in fields(Sampling)]
    if name == "seed" and value in ("", "none"):
        return replace(sampling, seed=None)
    if name not in names:
        raise SupraError(f"unknown setting {name}: use one of {', '.join(names)}, stop")
    try:
        number: Any = int(value) if name in ("seed", "max_tokens") else float(value)
    except ValueError:
        raise SupraError(f"{name} must be a number, not '{value}'") from None
    return replace(sampling, **{name: number})
