"""Text generation with any backend: our own loop over prefill and decode steps."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from supra_core.errors import FormatError, SupraError
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend, Logits, StateArrays
from supra_core.runtime.batch import SequentialBatch
from supra_core.runtime.engine import Batch
from supra_core.runtime.likelihood import Likelihood, likelihoods
from supra_core.runtime.sampling import OnToken, Sampling, continuation
from supra_core.runtime.tokenized_engine import TokenizedEngine
from supra_core.text import ModelTokenizer

# Tokens fed at once: a backend returns the logits of all of them.
_PIECE = 512
# Fewer where all logits are needed: each row is copied.
_SCORED = 128


@dataclass
class Held:
    """A backend's state; None before the first token."""

    state: Any = None


class BackendEngine(TokenizedEngine):
    """:class:`~supra_core.runtime.engine.Engine` over a backend and the model's tokenizer."""

    def __init__(self, model: Backend, tokenizer: ModelTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.backend = model.name

    def fresh(self) -> Held:
        """The state before the first token."""
        return Held()

    def copy(self, state: Held) -> Held:
        """The same arrays, which no backend changes in place."""
        return Held(state.state)

    def feed(self, ids: Sequence[int], state: Held, progress: Progress = silent) -> None:
        """Feed ``ids`` to ``state`` in pieces."""
        for start in range(0, len(ids), _PIECE):
            part = ids[start : start + _PIECE]
            self._fed(part, state)
            progress("read", start + len(part), len(ids))

    def score(
        self, ids: Sequence[int], following: Sequence[int], state: Held, top: int
    ) -> list[Likelihood]:
        """How likely each of ``following`` was after ``ids``, which ``state`` is fed."""
        found = []
        for start in range(0, len(ids), _SCORED):
            part = slice(start, start + _SCORED)
            found += likelihoods(self._fed(ids[part], state)[0], following[part], top)
        return found

    def generate(
        self,
        ids: Sequence[int],
        state: Held,
        sampling: Sampling,
        progress: Progress = silent,
        seen: Sequence[int] = (),
        continues: bool = False,
        on_token: OnToken | None = None,
    ) -> Generator[tuple[int, str]]:
        """Tokens after ``ids`` with their text, up to the end of the turn, which is none."""
        if not len(ids):
            raise SupraError("the prompt is empty: give at least one token to go on from")
        self.feed(ids[:-1], state, progress)
        logits = self._fed(ids[-1:], state)[0, -1]
        recent = (*seen, *ids)
        text = self.tokenizer.stream(recent if continues else ())
        steps = continuation(self.model, logits, state.state, recent, sampling, on_token=on_token)
        for token, after in steps:
            state.state = after
            yield token, text(token)

    def batch(self, size: int) -> Batch:
        """Any number of sequences, a step of each after the other."""
        return SequentialBatch(self)

    def arrays(self, state: Held) -> StateArrays:
        """By the backend's own names; none before the first token."""
        return {} if state.state is None else self.model.state_arrays(state.state)

    def restored(self, arrays: StateArrays) -> Held:
        """The inverse of :meth:`arrays`; FormatError when they are not this model's."""
        if not arrays:
            return Held()
        try:
            return Held(self.model.state_from_arrays(arrays))
        except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
            raise FormatError(
                f"the state does not fit the model ({error}): it is another model's"
            ) from None

    def _fed(self, ids: Sequence[int], state: Held) -> Logits:
        logits, state.state = self.model.prefill(np.array([ids], dtype=np.int64), state.state)
        return logits
