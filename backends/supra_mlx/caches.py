"""mlx-lm's caches as named arrays, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from supra_core.errors import SupraError
from supra_core.runtime.backend import StateArrays
from supra_core.tensors import Array
from supra_mlx.model import LINEAR_SLOTS
from supra_mlx.weights import to_mlx, to_numpy


def layer_arrays(caches: list[Any] | tuple[Any, ...]) -> StateArrays:
    """``layers.N.NAME`` of :meth:`Model.make_cache`'s caches that have seen a token.

    Linear layers' slots and keys and values have their names, a sliding window's entries numbers.
    """
    return {
        f"layers.{index}.{name}": array
        for index, cache in enumerate(caches)
        for name, array in (() if cache.empty() else _named(cache))
    }


def fill(caches: list[Any], arrays: StateArrays) -> None:
    """The inverse of :func:`layer_arrays`, into empty caches; KeyError names a missing array."""
    for index, cache in enumerate(caches):
        prefix = f"layers.{index}."
        if isinstance(cache, ArraysCache):
            for slot in range(len(cache.cache)):
                cache[slot] = to_mlx(arrays[prefix + LINEAR_SLOTS[slot]])
        elif isinstance(cache, KVCache):
            keys, values = (to_mlx(arrays[prefix + name]) for name in ("keys", "values"))
            cache.state = keys, values, keys.shape[2]
        else:
            fill_numbered(cache, [arrays[f"{prefix}{i}"] for i in range(len(cache.state))])


def numbered(cache: Any) -> Iterator[tuple[str, Array]]:
    """The entries of a cache's own state, by their place; SupraError for what is no array."""
    for entry, value in enumerate(cache.state):
        if not isinstance(value, (mx.array, int)):
            raise SupraError(
                f"mlx-lm's {type(cache).__name__} cannot be saved as arrays: use the "
                "backend mlx to save states"
            )
        yield str(entry), to_numpy(value) if isinstance(value, mx.array) else np.array(value)


def fill_numbered(cache: Any, entries: list[Array]) -> None:
    """The inverse of :func:`numbered`; ValueError for a place outside of a window's cache."""
    if isinstance(cache, RotatingKVCache):
        keys, values, _, keep, most, place = entries
        within = 0 <= int(place) <= keys.shape[2] == values.shape[2]
        if not within or keep != cache.keep or most != cache.max_size:
            raise ValueError("a sliding window's place is outside of its keys")
    cache.state = tuple(x.item() if x.ndim == 0 else to_mlx(x) for x in entries)


def _named(cache: Any) -> Iterator[tuple[str, Array]]:
    if isinstance(cache, ArraysCache):
        held = zip(LINEAR_SLOTS, cache.cache, strict=False)
    elif isinstance(cache, KVCache):
        held = zip(("keys", "values"), cache.keys_and_values(), strict=True)
    else:
        yield from numbered(cache)
        return
    for name, array in held:
        yield name, to_numpy(array)
