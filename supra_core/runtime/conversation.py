"""A conversation whose state is kept, so that each turn feeds its own tokens only."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from supra_core.errors import FormatError
from supra_core.progress import Progress, silent
from supra_core.runtime.engine import Engine, Message
from supra_core.runtime.sampling import REPETITION_CONTEXT, Sampling

# Turns that can be undone from a kept state; each costs one state (64 MiB for a 7B model).
_SNAPSHOTS = 8


@dataclass(frozen=True)
class Snapshot:
    """A conversation at one moment; a recurrent state cannot be rewound, only kept.

    ``began``: the time that the chat template was told; None if it is not known.
    """

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    state: Any
    began: datetime | None = None


class Conversation:
    """Messages, the tokens the state has seen, and the state itself.

    The chat template renders the whole transcript every turn; only tokens that the state has not
    seen are fed. If the rendering differs from what was seen (a template may strip white space, a
    stop string cuts an answer), the conversation continues from the last kept state that fits.
    ``prompt_tokens`` and ``generated_tokens`` are the last turn's so far. ``began``: when the first
    token was fed. The template is told this time from then on, because many templates begin with
    today's date, and on another day no state would fit.
    """

    messages: list[Message]
    tokens: list[int]
    state: Any
    began: datetime | None
    prompt_tokens = generated_tokens = 0

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        messages = () if system is None else ({"role": "system", "content": system},)
        self._begin(Snapshot(messages, (), engine.fresh()))

    def clear(self) -> None:
        """Forget every turn; a system prompt, and a text that was read, stay."""
        self.messages = list(self._start.messages)
        self._snapshots: list[Snapshot] = []
        self._load(self._start)

    @property
    def turns(self) -> int:
        """Questions that were answered."""
        return sum(message["role"] == "user" for message in self.messages)

    def snapshot(self) -> Snapshot:
        """The conversation as it is now."""
        state = self.engine.copy(self.state)
        return Snapshot(tuple(self.messages), tuple(self.tokens), state, self.began)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot; undoing its turns feeds the remaining ones again.

        If the snapshot does not say when it began, it begins now; see :meth:`fits`.
        """
        if snapshot.began is None:
            snapshot = replace(snapshot, began=clock())
        before = [message for message in snapshot.messages if message["role"] == "system"]
        asked = len(before) < len(snapshot.messages)
        fresh = Snapshot(tuple(before), (), self.engine.fresh(), snapshot.began)
        self._begin(fresh if asked else snapshot)
        self.messages = list(snapshot.messages)
        self._load(snapshot)

    def fits(self) -> bool:
        """Whether the next turn continues from the state, without feeding everything again.

        Raises as the engine's ``render``.
        """
        following = [*self.messages, {"role": "user", "content": "Why?"}]
        return not self.tokens or _fits(self.tokens, self.engine.render(following, self.began))

    def branch(self) -> Conversation:
        """Another conversation with the same past."""
        other = Conversation(self.engine)
        other.restore(self.snapshot())
        other._start, other._snapshots = self._start, list(self._snapshots)
        return other

    def undo(self) -> str | None:
        """Remove the last turn; returns its question, None if there was no turn."""
        if not self.turns:
            return None
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        question = str(self.messages[last]["content"])
        del self.messages[last:]
        if self._snapshots:
            self._load(self._snapshots.pop())
        else:
            # Its state is no longer kept: the next turn feeds the transcript again.
            self._load(self._start)
        return question

    def read(self, text: str, progress: Progress = silent) -> int:
        """Feed a text once, as a system message, for all turns; returns the number of tokens.

        Raises ValueError after the first turn, FormatError if the chat template drops questions.
        """
        if self.turns:
            raise ValueError("a text is read before the first turn")
        before = [message["content"] for message in self.messages]
        system = {"role": "system", "content": "\n\n".join([*before, text])}
        began = clock()
        # Their common beginning stands before any question.
        one, other = (
            self.engine.render([system, {"role": "user", "content": question}], began)
            for question in ("a", "Which?")
        )
        pairs = enumerate(zip(one, other, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), None)
        if shared is None:
            raise FormatError(
                "the model's chat template leaves the question out: correct chat_template.jinja"
            )
        state = self.engine.fresh()
        if shared:
            self.engine.feed(one[:shared], state, progress)
        self._begin(Snapshot((system,), tuple(one[:shared]), state, began))
        return shared

    def reply(
        self,
        text: str,
        sampling: Sampling,
        *,
        stop: Sequence[str] = (),
        progress: Progress = silent,
    ) -> Generator[str]:
        """The answer to ``text``, piece by piece, up to the first of the strings ``stop``.

        If the caller stops early, the answer so far stays in the conversation; if there is none
        yet, the turn is removed.
        """
        self._snapshots.append(self.snapshot())
        del self._snapshots[:-_SNAPSHOTS]
        self.prompt_tokens = self.generated_tokens = 0
        if not self.tokens:
            self.began = clock()
        self.messages.append({"role": "user", "content": text})
        answer: list[str] = []
        started = False
        try:
            ids = self._unseen(self.engine.render(self.messages, self.began))
            self.prompt_tokens = len(ids)
            held = HeldBack(stop)
            seen = self.tokens[-REPETITION_CONTEXT:]
            steps = self.engine.generate(ids, self.state, sampling, progress, seen)
            with closing(steps):
                for token, piece in steps:
                    self.tokens += [token] if started else [*ids, token]
                    started, self.generated_tokens = True, self.generated_tokens + 1
                    answer.append(held.take(piece))
                    if answer[-1]:
                        yield answer[-1]
                    if held.stopped:
                        break
            if not started:
                # An empty answer is an answer, too.
                started = True
                self.tokens += ids
            answer.append(held.rest())
            if answer[-1]:
                yield answer[-1]
        except GeneratorExit:
            raise
        except BaseException:
            # Ctrl-C may strike in the middle of a step: the state is whole only before the turn.
            self._load(self._snapshots[-1])
            raise
        finally:
            if started:
                self.messages.append({"role": "assistant", "content": "".join(answer)})
            else:
                self.undo()

    def _unseen(self, ids: list[int]) -> list[int]:
        """The part of ``ids`` that the state has not seen; may load an earlier state."""
        if not _fits(self.tokens, ids):
            # The rendering was told this time, whichever state fits.
            began = self.began
            for snapshot in reversed([self._start, *self._snapshots]):
                if _fits(snapshot.tokens, ids):
                    self._load(snapshot)
                    break
            else:
                self.tokens, self.state = [], self.engine.fresh()
            self.began = began
        return ids[len(self.tokens) :]

    def _begin(self, start: Snapshot) -> None:
        self._start = start
        self.clear()

    def _load(self, snapshot: Snapshot) -> None:
        self.tokens = list(snapshot.tokens)
        self.state = self.engine.copy(snapshot.state)
        self.began = snapshot.began


class HeldBack:
    """Text in pieces up to the first stop string; a possible beginning of one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.stopped = False
        self._strings = [string for string in strings if string]
        self._held = ""

    def take(self, piece: str) -> str:
        """The text that is now certain to stand before any stop string."""
        self._held += piece
        found = [at for at in map(self._held.find, self._strings) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(self._held) - self._begun()
        certain, self._held = self._held[:keep], "" if found else self._held[keep:]
        return certain

    def rest(self) -> str:
        """At the end of the text: what was held back and began no stop string."""
        held, self._held = self._held, ""
        return held

    def _begun(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return max(
            (
                length
                for string in self._strings
                for length in range(1, min(len(string), len(self._held) + 1))
                if self._held.endswith(string[:length])
            ),
            default=0,
        )


def clock() -> datetime:
    """The local time in whole seconds, as templates are told it."""
    return datetime.now().replace(microsecond=0)


def _fits(seen: Sequence[int], ids: Sequence[int]) -> bool:
    # At least one token must be left to predict from.
    return len(seen) < len(ids) and list(ids[: len(seen)]) == list(seen)
