"""The interface of a loaded model for conversations and servers: one sequence, or a batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

from supra_core.errors import SupraError
from supra_core.progress import Progress
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.sampling import OnToken, Sampling
from supra_core.text.chat_template import ANSWER, Rendering

Message = dict[str, Any]
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class StepOutput:
    """A sequence's next token with the text that it completes; ``finish``: it was the last.

    ``token`` None: the sequence ended without another token. ``likelihood``: if requested, also of
    the token that ended the sequence. ``error``: why this sequence stops while others continue;
    the caller has to take it.
    """

    key: int
    token: int | None
    text: str
    finish: Finish | None = None
    likelihood: Likelihood | None = None
    error: SupraError | None = None


class Batch(Protocol):
    """Sequences that are generated together; each may join and leave at any step."""

    def add(
        self,
        ids: Sequence[int],
        state: Any,
        sampling: Sampling,
        seen: Sequence[int] = (),
        continues: bool = False,
        top: int | None = None,
    ) -> int:
        """Feed ``ids``, at least one, to ``state`` and generate from there; returns a key.

        ``seen`` and ``continues`` as in :meth:`Engine.generate`. ``top``: give each token's
        likelihood and those of so many likeliest tokens.
        """
        ...

    def step(self) -> list[StepOutput]:
        """The next token of every sequence that has one."""
        ...

    def take(self, key: int) -> Any:
        """Remove a sequence, ended or not; returns the state after its last token."""
        ...

    def close(self) -> None:
        """Drop all sequences."""
        ...


class Engine(Protocol):
    """A loaded model that generates text.

    :meth:`feed` and :meth:`generate` change a state; a copy shares its arrays, which nothing
    changes.
    """

    backend: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as within a longer text; special tokens by their names."""
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
        """An independent copy of a state."""
        ...

    def feed(self, ids: Sequence[int], state: Any, progress: Progress) -> None:
        """Feed ``ids``, at least one, to ``state``."""
        ...

    def score(
        self, ids: Sequence[int], following: Sequence[int], state: Any, top: int
    ) -> list[Likelihood]:
        """Feed ``ids``; how likely ``following`` were, each the token after one of ``ids``."""
        ...

    def generate(
        self,
        ids: Sequence[int],
        state: Any,
        sampling: Sampling,
        progress: Progress,
        seen: Sequence[int] = (),
        continues: bool = False,
        on_token: OnToken | None = None,
    ) -> Generator[tuple[int, str]]:
        """Tokens after ``ids``, each with the text that it completes; the state has seen them.

        ``seen``: earlier tokens, for the repetition penalty. ``continues``: the text continues
        theirs, rather than beginning anew as an answer does. ``on_token`` is called with the
        logits and each token.
        """
        ...

    def batch(self, size: int) -> Batch:
        """A batch that generates up to ``size`` sequences at a time."""
        ...

    def arrays(self, state: Any) -> StateArrays:
        """The state for a file; the inverse of :meth:`restored`."""
        ...

    def restored(self, arrays: StateArrays) -> Any:
        """The state of a file; FormatError when it is no state of this model."""
        ...
