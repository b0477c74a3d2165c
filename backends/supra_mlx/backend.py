"""The MLX backend of :class:`supra_core.runtime.backend.Backend`: NumPy in, NumPy out."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError
from supra_core.measure.perplexity import Greedy, Losses
from supra_core.model.spec import ModelSpec
from supra_core.runtime.backend import Form, Ids, Logits, Mask, StateArrays
from supra_core.sources.source import open_source
from supra_mlx.caches import fill, layer_arrays
from supra_mlx.model import Model
from supra_mlx.pieces import pieces
from supra_mlx.weights import load_source


@dataclass(frozen=True)
class MLXState:
    """A batch's memory: a cache a layer, and which of the tokens seen were no padding.

    valid (B, S) bool; None as long as nothing was padded.
    """

    caches: tuple[Any, ...]
    batch: int
    tokens: int = 0
    valid: npt.NDArray[np.bool_] | None = None

    def history(self, mask: Mask | None, length: int) -> npt.NDArray[np.bool_] | None:
        """(B, S + T) validity after ``length`` more tokens; None if nothing is padded."""
        if self.valid is None and (mask is None or mask.all()):
            return None
        before, new = self.valid, mask
        if before is None:
            before = np.ones((self.batch, self.tokens), dtype=bool)
        if new is None:
            new = np.ones((self.batch, length), dtype=bool)
        return np.concatenate([before, new], axis=1)


class MLXBackend:
    """A model in MLX. States are never changed in place: every call works on a copy."""

    name = "mlx"

    def __init__(self, model: Model) -> None:
        self.model = model
        self.spec: ModelSpec = model.spec

    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V), float32.

        ``form``: ``parallel`` is one prefill, ``recurrent`` a prefill in uneven pieces through
        the cache, ``step`` one token a call.
        """
        state, parts = None, []
        for piece in pieces(np.shape(ids)[1], form):
            part = None if mask is None else mask[:, piece]
            logits, state = self.prefill(ids[:, piece], state, mask=part)
            parts.append(logits)
        return np.concatenate(parts, axis=1)

    def token_scores(self, ids: Ids, *, form: Form = "parallel") -> tuple[Losses, Greedy]:
        """-log p of ids[:, 1:] in nats, and whether each is the likeliest, both (B, T - 1)."""
        ids = np.asarray(ids)
        caches = self.model.make_cache(bounded=False)
        losses, greedy = [], []
        for piece in pieces(ids.shape[1], form):
            logits = self.model(mx.array(ids[:, piece].astype(np.int32)), caches)
            # The piece's last token says something about the next piece's first.
            targets = mx.array(ids[:, piece.start + 1 : piece.stop + 1].astype(np.int32))
            if not targets.shape[1]:
                break
            logits = logits[:, : targets.shape[1]].astype(mx.float32)
            losses.append(nn.losses.cross_entropy(logits, targets))
            greedy.append(logits.argmax(axis=-1) == targets)
            mx.eval(losses[-1], greedy[-1], [cache.state for cache in caches])
        return (
            np.array(mx.concatenate(losses, axis=1)),
            np.array(mx.concatenate(greedy, axis=1)),
        )

    def prefill(
        self, ids: Ids, state: MLXState | None = None, *, mask: Mask | None = None
    ) -> tuple[Logits, MLXState]:
        """Logits (B, T, V) and the state after ids (B, T), going on from ``state``."""
        ids = np.asarray(ids)
        B, T = ids.shape
        before = state or MLXState(tuple(self.model.make_cache(bounded=False)), B)
        # MLX arrays are immutable: the copy shares them all.
        caches = copy.deepcopy(list(before.caches))
        valid = before.history(mask, T)
        logits = self.model(
            mx.array(ids.astype(np.int32)), caches, None if valid is None else mx.array(valid)
        ).astype(mx.float32)
        mx.eval(logits, [cache.state for cache in caches])
        return np.array(logits), MLXState(tuple(caches), B, before.tokens + T, valid)

    def step(self, ids: Ids, state: MLXState) -> tuple[Logits, MLXState]:
        """Logits (B, V) and the state after one more token each, ids (B,)."""
        logits, after = self.prefill(np.asarray(ids)[:, None], state)
        return logits[:, 0], after

    def state_arrays(self, state: MLXState) -> StateArrays:
        """Named arrays: ``layers.N.state``, ``layers.N.keys`` and so on, for a file."""
        arrays: StateArrays = {"tokens": np.array([state.batch, state.tokens])}
        if state.valid is not None:
            arrays["valid"] = state.valid
        return arrays | layer_arrays(self.model, state.caches)

    def state_from_arrays(self, arrays: StateArrays) -> MLXState:
        """The inverse of :meth:`state_arrays`; FormatError when an array is missing."""
        caches = self.model.make_cache(bounded=False)
        try:
            batch, tokens = (int(n) for n in arrays["tokens"])
            if tokens:
                fill(self.model, caches, arrays)
        except KeyError as error:
            raise FormatError(
                f"the state has no array {error.args[0]!r}: it was saved by another model or "
                "backend; start from the text again"
            ) from None
        return MLXState(tuple(caches), batch, tokens, arrays.get("valid"))


def load(path: str | Path, *, dtype: str | None = None) -> MLXBackend:
    """The model at ``path``, anything that ``open_source`` opens, in MLX.

    ``dtype``: the type to compute in; None keeps the weights' own. No code of a folder is run.
    """
    return MLXBackend(load_source(open_source(path), dtype=dtype))
