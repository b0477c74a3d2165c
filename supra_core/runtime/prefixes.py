"""States kept by the tokens that they have seen, so that no prefix is fed twice."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Kept:
    owner: str
    tokens: Tokens
    state: Any
    size: int

    @property
    def key(self) -> tuple[str, bytes]:
        return self.owner, self.tokens.tobytes()


class Prefixes:
    """The most recently used states, up to ``limit`` bytes; pinned states do not count.

    ``size``: bytes of a state after so many tokens. Only its owner finds a state: a hit would tell
    others how the owner's texts begin. Pinned states are for everybody.
    """

    def __init__(self, limit: int, size: Callable[[int], int]) -> None:
        self._limit, self._size = limit, size
        self._kept: OrderedDict[tuple[str, bytes], _Kept] = OrderedDict()
        self._pinned: dict[bytes, _Kept] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._pinned)

    def pin(self, tokens: Sequence[int], state: Any) -> None:
        """Keep a state for good and for everybody."""
        kept = self._entry(tokens, state, "")
        self._pinned[kept.tokens.tobytes()] = kept

    def put(self, tokens: Sequence[int], state: Any, owner: str = "") -> None:
        """Keep a state; drop the least recently used ones."""
        kept = self._entry(tokens, state, owner)
        _, seen = kept.key
        if not seen or seen in self._pinned or kept.size > self._limit:
            return
        if (before := self._kept.pop(kept.key, None)) is not None:
            self.bytes -= before.size
        self._kept[kept.key] = kept
        self.bytes += kept.size
        while self.bytes > self._limit:
            self.bytes -= self._kept.popitem(last=False)[1].size

    def longest(self, ids: Sequence[int], owner: str = "") -> tuple[int, Any]:
        """The longest prefix of ``ids`` with a state, and that state; 0 and None if there is none.

        At least one token is left to predict from.
        """
        wanted = _array(ids)
        fitting = [
            kept
            for kept in self._all(owner)
            if len(kept.tokens) < len(wanted) and _common(kept.tokens, wanted) == len(kept.tokens)
        ]
        if not fitting:
            return 0, None
        found = max(fitting, key=lambda kept: len(kept.tokens))
        if self._kept.get(found.key) is found:
            self._kept.move_to_end(found.key)
        return len(found.tokens), found.state

    def shared(self, ids: Sequence[int], owner: str = "") -> int:
        """The longest prefix of ``ids`` that any text kept for the owner begins with.

        A state there would serve both texts.
        """
        wanted = _array(ids)
        return max((_common(kept.tokens, wanted) for kept in self._all(owner)), default=0)

    def _entry(self, tokens: Sequence[int], state: Any, owner: str) -> _Kept:
        return _Kept(owner, _array(tokens), state, self._size(len(tokens)))

    def _all(self, owner: str) -> list[_Kept]:
        own = [kept for kept in self._kept.values() if kept.owner == owner]
        return [*self._pinned.values(), *own]


def _array(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, dtype=np.int64)


def _common(one: Tokens, other: Tokens) -> int:
    """The number of first tokens that are the same."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
