"""Several sequences that one model speaks at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from supra_core.errors import SupraError
from supra_core.progress import silent
from supra_core.runtime.likelihood import Likelihood, Logits, likelihood
from supra_core.runtime.sampling import Hear, Sampling

if TYPE_CHECKING:
    from supra_core.runtime.conversation import Engine

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Spoken:
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

    def step(self) -> list[Spoken]:
        """The next token of every sequence that has one by now."""
        ...

    def take(self, key: int) -> Any:
        """The state after a sequence's last token; it leaves the batch, ended or not."""
        ...

    def close(self) -> None:
        """Leave everything that is under way."""
        ...


@dataclass
class _Sequence:
    state: Any
    pieces: Generator[tuple[int, str]]
    tokens_left: int
    heard: list[Likelihood]


class InTurns:
    """:class:`Batch` for any engine: one step of each sequence after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sequences: dict[int, _Sequence] = {}
        self._ended: dict[int, Any] = {}
        self._next_key = 0

    def add(
        self,
        ids: Sequence[int],
        state: Any,
        sampling: Sampling,
        seen: Sequence[int] = (),
        continues: bool = False,
        top: int | None = None,
    ) -> int:
        """Nothing is computed before the next step."""
        key, self._next_key = self._next_key, self._next_key + 1
        heard: list[Likelihood] = []
        hear: Hear | None = None
        if top is not None:

            def hear(logits: Logits, token: int) -> None:
                heard.append(likelihood(logits, token, top))

        pieces = self._engine.speak(ids, state, sampling, silent, seen, continues, hear)
        self._sequences[key] = _Sequence(state, pieces, sampling.max_tokens, heard)
        return key

    def step(self) -> list[Spoken]:
        """A token of each; a sequence's last one says so."""
        return [self._spoken(key) for key in list(self._sequences)]

    def take(self, key: int) -> Any:
        """KeyError when there is no such sequence."""
        if key in self._ended:
            return self._ended.pop(key)
        sequence = self._sequences.pop(key)
        sequence.pieces.close()
        return sequence.state

    def close(self) -> None:
        """No sequence is left."""
        for key in list(self._sequences):
            self.take(key)

    def _spoken(self, key: int) -> Spoken:
        sequence = self._sequences[key]
        try:
            token, text = next(sequence.pieces, (None, ""))
        except SupraError as error:
            return Spoken(key, None, "", error=error)
        sequence.tokens_left -= 1
        finish: Finish | None = None
        if token is None:
            finish = "stop"
        elif not sequence.tokens_left:
            finish = "length"
        if finish:
            self._ended[key] = self.take(key)
        likely = sequence.heard.pop() if sequence.heard else None
        return Spoken(key, token, text, finish, likely)
