"""A plain transformer in stock mlx-lm, behind the same protocol as every backend."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import MODEL_REMAPPING

from supra_core.errors import FormatError, SupraError
from supra_core.formats.finite import converted
from supra_core.formats.huggingface import for_library
from supra_core.model.spec import ModelSpec
from supra_core.runtime.backend import Form, Ids, Logits, Mask, StateArrays
from supra_core.sources.source import open_source
from supra_core.tensors import dtype_named
from supra_mlx.caches import loaded, saved
from supra_mlx.numbered import fill_numbered, numbered
from supra_mlx.pieces import pieces
from supra_mlx.weights import to_mlx

# How mlx-lm pads each kind of cache on the left.
_PADDED: dict[type, Callable[[Any, list[int]], Any]] = {
    KVCache: lambda cache, padding: BatchKVCache(padding),
    RotatingKVCache: lambda cache, padding: BatchRotatingKVCache(cache.max_size, padding),
    ArraysCache: lambda cache, padding: ArraysCache(len(cache.cache), padding),
}


@dataclass(frozen=True)
class StockState:
    """mlx-lm's cache a layer, and whether they are its batch caches with left padding."""

    caches: tuple[Any, ...]
    padded: bool = False


class StockBackend:
    """A model that mlx-lm itself builds. States are never changed in place."""

    name = "mlx-lm"

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self.model = model
        self.spec = spec

    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V), float32; forms as in :class:`supra_mlx.backend.MLXBackend`."""
        state, parts = self._start(mask), []
        for piece in pieces(np.shape(ids)[1], form):
            logits, state = self._run(ids[:, piece], state)
            parts.append(logits)
        return np.concatenate(parts, axis=1)

    def prefill(
        self, ids: Ids, state: StockState | None = None, *, mask: Mask | None = None
    ) -> tuple[Logits, StockState]:
        """Logits (B, T, V) and the state after ids (B, T), going on from ``state``.

        SupraError when a mask is more than left padding at the start: mlx-lm has no other.
        """
        if state is None:
            return self._run(ids, self._start(mask))
        if mask is not None and not np.all(mask):
            raise SupraError(
                "mlx-lm pads on the left of the first tokens only: leave the mask out of later "
                "calls, or use the backend mlx"
            )
        return self._run(ids, state)

    def step(self, ids: Ids, state: StockState) -> tuple[Logits, StockState]:
        """Logits (B, V) and the state after one more token each, ids (B,)."""
        logits, after = self._run(np.asarray(ids)[:, None], state)
        return logits[:, 0], after

    def state_arrays(self, state: StockState) -> StateArrays:
        """Each entry of mlx-lm's cache state as ``layers.N.M``."""
        arrays: StateArrays = {"padded": np.array(state.padded)}
        for index, cache in enumerate(state.caches):
            for place, entry in () if cache.empty() else numbered(cache):
                arrays[f"layers.{index}.{place}"] = saved(entry)
        return arrays

    def state_from_arrays(self, arrays: StateArrays) -> StockState:
        """The inverse of :meth:`state_arrays`; FormatError when an array is missing."""
        if "padded" not in arrays:
            raise FormatError(
                "the state was saved by another backend: start from the text again, or load it "
                "in the backend that saved it"
            )
        padded = bool(arrays["padded"])
        caches = self._caches([0] if padded else None)
        for index, cache in enumerate(caches):
            prefix = f"layers.{index}."
            count = sum(name.startswith(prefix) for name in arrays)
            if count:
                fill_numbered(cache, [loaded(arrays[f"{prefix}{n}"]) for n in range(count)])
        return StockState(tuple(caches), padded)

    def _start(self, mask: Mask | None) -> StockState:
        if mask is None or np.all(mask):
            return StockState(tuple(self._caches(None)))
        mask = np.asarray(mask, dtype=bool)
        if not (np.diff(mask.astype(int), axis=1) >= 0).all():
            raise SupraError(
                "mlx-lm takes padding on the left only: move it there, or use the backend mlx"
            )
        return StockState(tuple(self._caches([int(n) for n in (~mask).sum(axis=1)])), True)

    def _caches(self, padding: list[int] | None) -> list[Any]:
        caches = make_prompt_cache(self.model)
        if padding is None:
            return caches
        for cache in caches:
            if type(cache) not in _PADDED:
                raise SupraError(
                    f"mlx-lm cannot pad its {type(cache).__name__}: run the rows one at a time"
                )
        return [_PADDED[type(cache)](cache, padding) for cache in caches]

    def _run(self, ids: Ids, state: StockState) -> tuple[Logits, StockState]:
        # MLX arrays are immutable: the copy shares them all.
        caches = copy.deepcopy(list(state.caches))
        logits = self.model(mx.array(np.asarray(ids, dtype=np.int32)), cache=caches)
        logits = logits.astype(mx.float32)
        mx.eval(logits, [cache.state for cache in caches])
        return np.array(logits), StockState(tuple(caches), state.padded)


def load(path: str | Path, *, dtype: str | None = None) -> StockBackend:
    """The transformer ``path``, anything that ``open_source`` opens, by mlx-lm's own code.

    mlx-lm sees no file of the source: its config is written from our spec, and its weights are
    the tensors that our readers checked. ``dtype``: the type to compute in; None keeps the
    weights' own. Raises SupraError when the model is one that mlx-lm cannot build.
    """
    source = open_source(path)
    config, tensors = for_library("stock mlx-lm", source.spec, source.tensors, str(path))
    if dtype is not None:
        target = dtype_named(dtype)
        tensors = {name: converted(name, tensor, target) for name, tensor in tensors.items()}
    try:
        model = _built(config)
        weights = {name: to_mlx(tensor.read()) for name, tensor in tensors.items()}
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        model.load_weights(list(weights.items()))
    except (ImportError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SupraError(
            f"{path} cannot be run by stock mlx-lm ({reason.rstrip('.')}): use another backend"
        ) from error
    mx.eval(model.parameters())
    return StockBackend(model.eval(), source.spec)


def _built(config: dict[str, Any]) -> Any:
    """mlx-lm's module for a config, with weights still to come."""
    family = config["model_type"]
    module = import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(family, family)}")
    return module.Model(module.ModelArgs.from_dict(config))
