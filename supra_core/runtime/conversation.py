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

# Turns whose states are kept to go back to; each costs one state (64 MiB for a 7B model).
_SNAPSHOTS = 8


@dataclass(frozen=True)
class Snapshot:
    """A recurrent state cannot be wound back, only kept.

    ``began``: the time that the chat template was told, None where it is not known.
    """

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    state: Any
    began: datetime | None = None


class Conversation:
    """Messages, the tokens the state has seen, and the state itself.

    The whole transcript is rendered by the chat template every turn; what the state has seen of
    it is not fed again. If the rendering differs from what was seen (a template may strip white
    space, a stop string cuts what was said), the last kept state that still fits is taken up.
    ``fed`` and ``said``: tokens of the last turn's prompt and of its answer so far. ``began``: when
    the first token was read, which is the time that the chat template is told from then on: many
    a template puts today's date before everything, and on another day nothing would fit.
    """

    messages: list[Message]
    tokens: list[int]
    state: Any
    began: datetime | None
    fed = said = 0

    def __init__(self, engine: Engine, system: str | None = None) -> None:
        self.engine = engine
        messages = () if system is None else ({"role": "system", "content": system},)
        self._begin(Snapshot(messages, (), engine.fresh()))

    def clear(self) -> None:
        """Forget every turn; a system prompt, and a text that was read, stay."""
        self.messages = list(self._start.messages)
        self._snapshots: list[Snapshot] = []
        self._take_up(self._start)

    @property
    def turns(self) -> int:
        """Questions that were answered."""
        return sum(message["role"] == "user" for message in self.messages)

    def snapshot(self) -> Snapshot:
        """Where the conversation stands; it may go on."""
        state = self.engine.copy(self.state)
        return Snapshot(tuple(self.messages), tuple(self.tokens), state, self.began)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from there; turns before it can be taken back by feeding the rest again.

        Where the snapshot does not say when it began, it is now; see :meth:`fits`.
        """
        if snapshot.began is None:
            snapshot = replace(snapshot, began=clock())
        before = [message for message in snapshot.messages if message["role"] == "system"]
        asked = len(before) < len(snapshot.messages)
        fresh = Snapshot(tuple(before), (), self.engine.fresh(), snapshot.began)
        self._begin(fresh if asked else snapshot)
        self.messages = list(snapshot.messages)
        self._take_up(snapshot)

    def fits(self) -> bool:
        """Whether the next turn goes on from the state, and need not feed everything again.

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
        """Take the last turn back; returns its question, None when there was no turn."""
        if not self.turns:
            return None
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        question = str(self.messages[last]["content"])
        del self.messages[last:]
        if self._snapshots:
            self._take_up(self._snapshots.pop())
        else:
            # Too long ago: the next turn feeds what is left once more.
            self._take_up(self._start)
        return question

    def read(self, text: str, progress: Progress = silent) -> int:
        """Show the model a text once, as what the system says; returns the tokens fed.

        Only before the first turn: ValueError later. All turns go on from its state. Raises
        FormatError when the chat template has no place for it.
        """
        if self.turns:
            raise ValueError("a text is read before the first turn")
        before = [message["content"] for message in self.messages]
        system = {"role": "system", "content": "\n\n".join([*before, text])}
        began = clock()
        # What both have in common stands before any question.
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
        """The answer to ``text``, piece by piece, until the first of the strings ``stop``.

        What has been said when the caller stops early stays in the conversation. When nothing
        has, the turn is taken back.
        """
        self._snapshots.append(self.snapshot())
        del self._snapshots[:-_SNAPSHOTS]
        self.fed = self.said = 0
        if not self.tokens:
            self.began = clock()
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        started = False
        try:
            ids = self._unseen(self.engine.render(self.messages, self.began))
            self.fed = len(ids)
            held = HeldBack(stop)
            seen = self.tokens[-REPETITION_CONTEXT:]
            speech = self.engine.speak(ids, self.state, sampling, progress, seen)
            with closing(speech) as pieces:
                for token, piece in pieces:
                    self.tokens += [token] if started else [*ids, token]
                    started, self.said = True, self.said + 1
                    said.append(held.take(piece))
                    if said[-1]:
                        yield said[-1]
                    if held.stopped:
                        break
            if not started:
                # An answer without a word is one, too.
                started = True
                self.tokens += ids
            said.append(held.rest())
            if said[-1]:
                yield said[-1]
        except GeneratorExit:
            raise
        except BaseException:
            # Ctrl-C may strike in the middle of a step: the state is whole only before the turn.
            self._take_up(self._snapshots[-1])
            raise
        finally:
            if started:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.undo()

    def _unseen(self, ids: list[int]) -> list[int]:
        """What of ``ids`` the state has yet to see; takes up an earlier state if need be."""
        if not _fits(self.tokens, ids):
            # Whichever state it is, what is rendered was told this time.
            began = self.began
            for snapshot in reversed([self._start, *self._snapshots]):
                if _fits(snapshot.tokens, ids):
                    self._take_up(snapshot)
                    break
            else:
                self.tokens, self.state = [], self.engine.fresh()
            self.began = began
        return ids[len(self.tokens) :]

    def _begin(self, start: Snapshot) -> None:
        self._start = start
        self.clear()

    def _take_up(self, snapshot: Snapshot) -> None:
        self.tokens = list(snapshot.tokens)
        self.state = self.engine.copy(snapshot.state)
        self.began = snapshot.began


class HeldBack:
    """Text in pieces, up to the first of some strings; what may become one is held back."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.stopped = False
        self._strings = [string for string in strings if string]
        self._held = ""

    def take(self, piece: str) -> str:
        """What is certain to be before any of the strings, once ``piece`` has come."""
        self._held += piece
        found = [at for at in map(self._held.find, self._strings) if at >= 0]
        self.stopped = bool(found)
        keep = min(found) if found else len(self._held) - self._begun()
        certain, self._held = self._held[:keep], "" if found else self._held[keep:]
        return certain

    def rest(self) -> str:
        """What was held back for nothing, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _begun(self) -> int:
        """How long an end of the text is that begins one of the strings."""
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
