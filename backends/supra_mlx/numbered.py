"""The entries of mlx-lm's own caches by their place, for caches that have no names for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import RotatingKVCache

from supra_core.errors import SupraError


def numbered(cache: Any) -> Iterator[tuple[str, Any]]:
    """Places and entries of a cache's state; SupraError for an entry that cannot be saved."""
    for place, entry in enumerate(cache.state):
        if not isinstance(entry, (mx.array, int)):
            raise SupraError(
                f"mlx-lm's {type(cache).__name__} cannot be saved as arrays: use the "
                "backend mlx to save states"
            )
        yield str(place), entry


def fill_numbered(cache: Any, entries: Sequence[Any]) -> None:
    """The inverse of :func:`numbered`; ValueError for a place outside of a window's cache."""
    if isinstance(cache, RotatingKVCache):
        keys, values, _, keep, most, place = entries
        within = 0 <= int(place) <= keys.shape[2] == values.shape[2]
        if not within or keep != cache.keep or most != cache.max_size:
            raise ValueError("a sliding window's place is outside of its keys")
    cache.state = tuple(entries)
