"""Which kind of device the operators choose their form for.

That is where their tensors are, unless a step is only traced, to plan it for another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_planned: str | None = None


def kind(x: Tensor) -> str:
    """``cpu``, ``cuda``, ...: the type of the device that work on x is meant for."""
    return x.device.type if _planned is None else _planned


def is_planned() -> bool:
    """Whether tensors hold no numbers, because a step is only traced."""
    return _planned is not None


@contextmanager
def planned_for(device_type: str) -> Iterator[None]:
    """Inside, operators choose as on such a device; only for tensors that hold no numbers."""
    global _planned
    before, _planned = _planned, device_type
    try:
        yield
    finally:
        _planned = before
