"""A model's caches as named arrays, and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from supra_core.runtime.backend import StateArrays
from supra_core.tensors import Array
from supra_mlx.mixers.base import Entry
from supra_mlx.model import Model
from supra_mlx.weights import to_mlx, to_numpy


def layer_arrays(model: Model, caches: list[Any] | tuple[Any, ...]) -> StateArrays:
    """``layers.N.NAME`` of the caches that have seen a token, as each layer's mixer names them."""
    return {
        f"layers.{index}.{name}": saved(entry)
        for index, (mixer, cache) in enumerate(zip(model.mixers, caches, strict=True))
        for name, entry in (() if cache.empty() else mixer.entries(cache))
    }


def fill(model: Model, caches: list[Any], arrays: StateArrays) -> None:
    """The inverse of :func:`layer_arrays`, into empty caches; KeyError names a missing array."""
    for index, (mixer, cache) in enumerate(zip(model.mixers, caches, strict=True)):
        prefix = f"layers.{index}."

        def read(name: str, prefix: str = prefix) -> Entry:
            return loaded(arrays[prefix + name])

        mixer.restore(cache, read)


def saved(entry: Entry) -> Array:
    """An entry of a cache as a file has it."""
    return to_numpy(entry) if isinstance(entry, mx.array) else np.array(entry)


def loaded(array: Array) -> Entry:
    """The inverse of :func:`saved`."""
    return array.item() if array.ndim == 0 else to_mlx(array)
