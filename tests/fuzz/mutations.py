"""Changes to a valid file: of its bytes, its numbers, or its JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from copy import deepcopy
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

# Where readers that multiply, add or allocate go wrong.
EXTREMES = (
    0, 1, 2, 7, 8, 31, 32, 33, 63, 127, 128, 255, 256, 1023, 65535, 65536, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
_CODES = ("<B", "<H", "<I", "<Q")
# Control characters, ASCII, accents, scripts from right to left, half a pair, emoji, the last one.
_CHARACTERS = (
    0, 9, 10, 13, 27, *range(32, 127), 0x85, 0xE9, 0x301, 0x5D0, 0x200D, 0x202E, 0x2028, 0x2581,
    0x4E2D, 0xD800, 0xFDD0, 0xFEFF, 0xFFFD, 0x1F600, 0x10FFFF,
)  # fmt: skip

T = TypeVar("T")


class Chance:
    """Where choices come from: hypothesis, which can make a failing input smaller."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def number(self, least: int, most: int) -> int:
        """A whole number; both ends are possible."""
        return self._draw(st.integers(least, most))

    def one(self, values: Sequence[T]) -> T:
        """One of ``values``."""
        return self._draw(st.sampled_from(values))

    def binary(self, most: int) -> bytes:
        """1 to ``most`` bytes."""
        return self._draw(st.binary(min_size=1, max_size=most))

    def text(self, most: int) -> str:
        """Up to ``most`` characters."""
        return self._draw(st.text(max_size=most))


class Seeded(Chance):
    """From a generator of random numbers, which takes a hundredth of the time."""

    def __init__(self, random: Random) -> None:
        self._random = random

    def number(self, least: int, most: int) -> int:
        return self._random.randint(least, most)

    def one(self, values: Sequence[T]) -> T:
        return values[self._random.randrange(len(values))]

    def binary(self, most: int) -> bytes:
        return self._random.randbytes(self._random.randint(1, most))

    def text(self, most: int) -> str:
        characters = (self.one(_CHARACTERS) for _ in range(self.number(0, most)))
        return "".join(chr(c) for c in characters)


@st.composite
def mutated(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """``content`` with up to ``most`` changes of its bytes."""
    return changed_bytes(Chance(draw), content, most)


def changed_bytes(chance: Chance, content: bytes, most: int = 4) -> bytes:
    """As :func:`mutated`."""
    for _ in range(chance.number(1, most)):
        content = _changed(chance, content)
    return content


def _changed(chance: Chance, content: bytes) -> bytes:
    at = chance.number(0, len(content))
    kind = chance.number(0, 6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + chance.binary(8) + content[at:]
    if kind == 2:
        return content[:at] + content[at + chance.number(1, 64) :]
    if kind == 3:
        source = chance.number(0, len(content))
        piece = content[source : source + chance.number(1, 64)]
        return content[:at] + piece + content[at + len(piece) :]
    if kind == 4:
        code = chance.one(_CODES)
        size = struct.calcsize(code)
        value = chance.one(EXTREMES) % 256**size
        return content[:at] + struct.pack(code, value) + content[at + size :]
    return content[:at] + bytes([chance.number(0, 255)]) + content[at + 1 :]


WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2.5, -0.0, 1e308, 2**31 - 1, 2**31, 2**53, 2**63, 2**64,
    10**400, float("nan"), float("inf"), "", "x", "none", "1", "../../etc/passwd", "/etc/passwd",
    "a\nb\x1b[31m", "\ud800", "x" * 3000, [], {}, [0], [[]], {"": None}, [1, 2, 3], [None],
)  # fmt: skip


@st.composite
def changed_json(draw: st.DrawFn, value: Any, most: int = 3) -> bytes:
    """JSON of ``value`` with up to ``most`` members replaced, removed, added or nested."""
    return json.dumps(changed_value(Chance(draw), value, most)).encode()


def changed_value(chance: Chance, value: Any, most: int = 3) -> Any:
    """As :func:`changed_json`, before it is text."""
    value = deepcopy(value)
    for _ in range(chance.number(1, most)):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.one(places)
        kind = chance.number(0, 5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[chance.text(8)] = deepcopy(chance.one(WEIRD))
        elif kind == 2:
            other, name = chance.one(places)
            if _is_there(other, name):
                holder[key] = deepcopy(other[name])
        elif kind == 3:
            for _ in range(chance.one((1, 2, 70))):
                holder[key] = [holder[key]] if chance.number(0, 1) else {"a": holder[key]}
        else:
            holder[key] = deepcopy(chance.one(WEIRD))
    return value


def _places(value: Any) -> Any:
    """Every object or list with each of its keys, in a fixed order."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in list(members):
        yield value, key
        if isinstance(member, dict | list):
            yield from _places(member)


def _is_there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
