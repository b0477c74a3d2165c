"""What a loaded model offers to conversations and servers: one sequence, or several at a time."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from supra_core.errors import SupraError
from supra_core.progress import Progress
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.sampling import Hear, Sampling
from supra_core.text.chat_template import ANSWER, Rendering

Message = dict[str, Any]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class StepOutput:
    """One sequence's next token with the text that became certain; ``finish``: it was the last.

    ``token`` None: the sequence ended without another token. ``likelihood`` is there where it was
    asked for, and then of the token that ended the sequence as well. ``error``: why this sequence
    cannot go on, as the others do; it is to be taken.
    """

    key: int
    token: int | None
    text: str
    finish: Finish | None = None
    likelihood: Likelihood | None = None
    error: SupraError | None = None


class Batch(Protocol):
    """Sequences being spoken; each may come and go at any step."""

    def add(
        self,
        ids: Sequence[int],
        state: Any,
        sampling: Sampling,
        seen: Sequence[int] = (),
        continues: bool = False,
        top: int | None = None,
    ) -> int:
        """Begin a sequence after ``ids``, at least one, fed to ``state``; returns its key.

        ``seen``: the tokens before ``ids``, as many as the repetition penalty is to know.
        ``continues``: the text goes on from theirs, and does not begin anew as an answer does.
        ``top``: each token comes with its likelihood and that many likeliest ones.
        """
        ...

    def step(self) -> list[StepOutput]:
        """The next token of every sequence that has one by now."""
        ...

    def take(self, key: int) -> Any:
        """The state after a sequence's last token; it leaves the batch, ended or not."""
        ...

    def close(self) -> None:
        """Leave everything that is under way."""
        ...


class Engine(Protocol):
    """A loaded model that speaks.

    Its states are changed by :meth:`feed` and :meth:`speak`; a copy shares their arrays, which
    nothing changes.
    """

    backend: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as it is in the middle of a text, special tokens by their names."""
        ...

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now: datetime | None = None,
        how: Rendering = ANSWER,
    ) -> list[int]:
        """Token ids of the conversation by the model's chat template, up to the next answer.

        ``now``: what a template is told that asks for the time; None: the clock's.
        """
        ...

    def fresh(self) -> Any:
        """The state before the first token."""
        ...

    def copy(self, state: Any) -> Any:
        """A state that goes its own way from here."""
        ...

    def feed(self, ids: Sequence[int], state: Any, progress: Progress) -> None:
        """Show ``ids``, at least one, to ``state``."""
        ...

    def follow(
        self, ids: Sequence[int], following: Sequence[int], state: Any, top: int
    ) -> list[Likelihood]:
        """As :meth:`feed`; how likely ``following`` were, each the token after one of ``ids``."""
        ...

    def speak(
        self,
        ids: Sequence[int],
        state: Any,
        sampling: Sampling,
        progress: Progress,
        seen: Sequence[int] = (),
        continues: bool = False,
        hear: Hear | None = None,
    ) -> Generator[tuple[int, str]]:
        """Tokens after ``ids``, each with the text that became certain; the state has seen them.

        ``seen``: the tokens before ``ids``, as many as the repetition penalty is to know.
        ``continues``: the text goes on from theirs, and does not begin anew as an answer does.
        ``hear``: is told what each token was taken from.
        """
        ...

    def batch(self, size: int) -> Batch:
        """Room for ``size`` sequences that are spoken at a time."""
        ...

    def arrays(self, state: Any) -> StateArrays:
        """The state for a file; the inverse of :meth:`restored`."""
        ...

    def restored(self, arrays: StateArrays) -> Any:
        """The state of a file; FormatError when it is no state of this model."""
        ...
