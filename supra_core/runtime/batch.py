"""Several sequences of one model, a step of each in turn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from supra_core.errors import SupraError
from supra_core.progress import silent
from supra_core.runtime.engine import Engine, Finish, StepOutput
from supra_core.runtime.likelihood import Likelihood, Logits, likelihood
from supra_core.runtime.sampling import OnToken, Sampling


@dataclass
class _Sequence:
    state: Any
    pieces: Generator[tuple[int, str]]
    tokens_left: int
    likelihoods: list[Likelihood]


class SequentialBatch:
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
        likelihoods: list[Likelihood] = []
        on_token: OnToken | None = None
        if top is not None:

            def on_token(logits: Logits, token: int) -> None:
                likelihoods.append(likelihood(logits, token, top))

        pieces = self._engine.generate(ids, state, sampling, silent, seen, continues, on_token)
        self._sequences[key] = _Sequence(state, pieces, sampling.max_tokens, likelihoods)
        return key

    def step(self) -> list[StepOutput]:
        """A token of each; a sequence's last one says so."""
        return [self._step(key) for key in list(self._sequences)]

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

    def _step(self, key: int) -> StepOutput:
        sequence = self._sequences[key]
        try:
            token, text = next(sequence.pieces, (None, ""))
        except SupraError as error:
            return StepOutput(key, None, "", error=error)
        sequence.tokens_left -= 1
        finish: Finish | None = None
        if token is None:
            finish = "stop"
        elif not sequence.tokens_left:
            finish = "length"
        if finish:
            self._ended[key] = self.take(key)
        likely = sequence.likelihoods.pop() if sequence.likelihoods else None
        return StepOutput(key, token, text, finish, likely)
