"""Changes to a valid file, drawn by hypothesis: of its bytes, its numbers, or its JSON."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

# Where readers that multiply, add or allocate go wrong.
EXTREMES = (
    0, 1, 2, 7, 8, 31, 32, 33, 63, 127, 128, 255, 256, 1023, 65535, 65536, 2**31 - 1, 2**31,
    2**32 - 1, 2**32, 2**40, 2**53, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
_CODES = ("<B", "<H", "<I", "<Q")


@st.composite
def mutated(draw: st.DrawFn, content: bytes, most: int = 4) -> bytes:
    """``content`` with up to ``most`` changes of its bytes."""
    for _ in range(draw(st.integers(1, most))):
        content = _changed(draw, content)
    return content


def _changed(draw: st.DrawFn, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if kind == 2:
        return content[:at] + content[at + draw(st.integers(1, 64)) :]
    if kind == 3:
        source = draw(st.integers(0, len(content)))
        piece = content[source : source + draw(st.integers(1, 64))]
        return content[:at] + piece + content[at + len(piece) :]
    if kind == 4:
        code = draw(st.sampled_from(_CODES))
        size = struct.calcsize(code)
        value = draw(st.sampled_from(EXTREMES)) % 256**size
        return content[:at] + struct.pack(code, value) + content[at + size :]
    return content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]


WEIRD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2.5, -0.0, 1e308, 2**31 - 1, 2**31, 2**53, 2**63, 2**64,
    10**400, float("nan"), float("inf"), "", "x", "none", "1", "../../etc/passwd", "/etc/passwd",
    "a\nb\x1b[31m", "\ud800", "x" * 3000, [], {}, [0], [[]], {"": None}, [1, 2, 3], [None],
)  # fmt: skip


@st.composite
def changed_json(draw: st.DrawFn, value: Any, most: int = 3) -> bytes:
    """JSON of ``value`` with up to ``most`` members replaced, removed, added or nested."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(value))
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.integers(0, 5))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = deepcopy(draw(st.sampled_from(WEIRD)))
        elif kind == 2:
            other, name = draw(st.sampled_from(places))
            if _is_there(other, name):
                holder[key] = deepcopy(other[name])
        elif kind == 3:
            for _ in range(draw(st.sampled_from((1, 2, 70)))):
                holder[key] = draw(st.sampled_from(([holder[key]], {"a": holder[key]})))
        else:
            holder[key] = deepcopy(draw(st.sampled_from(WEIRD)))
    return json.dumps(value).encode()


def _places(value: Any) -> Any:
    """Every object or list with each of its keys, in a fixed order."""
    members = value.items() if isinstance(value, dict) else enumerate(value)
    for key, member in list(members):
        yield value, key
        if isinstance(member, dict | list):
            yield from _places(member)


def _is_there(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)
