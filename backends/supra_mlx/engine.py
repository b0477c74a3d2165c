"""A model in MLX that generates text, by mlx-lm's own generator."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx

from supra_core.errors import FormatError
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.engine import Batch
from supra_core.runtime.likelihood import Likelihood, likelihoods
from supra_core.runtime.sampling import OnToken, Sampling
from supra_core.runtime.tokenized_engine import TokenizedEngine
from supra_core.text import ModelTokenizer
from supra_mlx.batch import MLXBatch
from supra_mlx.caches import fill, layer_arrays
from supra_mlx.generate import PREFILL_STEP, stream
from supra_mlx.model import Model
from supra_mlx.weights import to_numpy

# mlx-lm's cache a layer; the arrays in it are never changed.
Caches = list[Any]

# Tokens fed at once where all of their logits are needed.
_SCORED = 128


class MLXEngine(TokenizedEngine):
    """:class:`~supra_core.runtime.engine.Engine` over a model and its tokenizer."""

    backend = "mlx"

    def __init__(self, model: Model, tokenizer: ModelTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def fresh(self) -> Caches:
        """The state before the first token."""
        return list(self.model.make_cache())

    def copy(self, state: Caches) -> Caches:
        """The same arrays in caches of their own."""
        return copy.deepcopy(state)

    def feed(self, ids: Sequence[int], state: Caches, progress: Progress) -> None:
        """Feed ``ids`` in pieces of the generator's size."""
        for start in range(0, len(ids), PREFILL_STEP):
            part = mx.array([list(ids[start : start + PREFILL_STEP])], dtype=mx.int32)
            self.model(part, cache=state)
            mx.eval([cache.state for cache in state])
            mx.clear_cache()
            progress("read", start + part.shape[1], len(ids))

    def score(
        self, ids: Sequence[int], following: Sequence[int], state: Caches, top: int
    ) -> list[Likelihood]:
        """How likely each of ``following`` was after ``ids``, which ``state`` is fed."""
        found = []
        for start in range(0, len(ids), _SCORED):
            part = slice(start, start + _SCORED)
            logits = self.model(mx.array([list(ids[part])], dtype=mx.int32), cache=state)
            rows = to_numpy(logits[0].astype(mx.float32))
            mx.eval([cache.state for cache in state])
            mx.clear_cache()
            found += likelihoods(rows, following[part], top)
        return found

    def generate(
        self,
        ids: Sequence[int],
        state: Caches,
        sampling: Sampling,
        progress: Progress = silent,
        seen: Sequence[int] = (),
        continues: bool = False,
        on_token: OnToken | None = None,
    ) -> Generator[tuple[int, str]]:
        """Tokens after ``ids`` with their text; the end of a turn is one of them."""
        text = self.tokenizer.stream((*seen, *ids) if continues else ())
        for token in stream(
            self.model, ids, sampling, cache=state, progress=progress, seen=seen, on_token=on_token
        ):
            yield token, text(token)

    def batch(self, size: int) -> Batch:
        """By mlx-lm's batch generator: one step of the model for all of them."""
        return MLXBatch(self.model, self.tokenizer, size)

    def arrays(self, state: Caches) -> StateArrays:
        """As :func:`layer_arrays` names them."""
        return layer_arrays(self.model, state)

    def restored(self, arrays: StateArrays) -> Caches:
        """The inverse of :meth:`arrays`; FormatError when an array is missing."""
        state = self.fresh()
        try:
            if arrays:
                fill(self.model, state, arrays)
        except KeyError as error:
            raise FormatError(
                f"the state has no array {error.args[0]!r}: it is another model's"
            ) from None
        except (ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise FormatError(
                f"the state does not fit the model ({error}): it is another model's"
            ) from None
        return state
