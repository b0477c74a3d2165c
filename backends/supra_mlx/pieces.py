"""How the forms cut a sequence into calls of the model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

from supra_core.runtime.backend import Form

# The recurrent form's lengths: one token, odd ones, and around the operator's chunk of 64.
_RECURRENT = (1, 37, 64, 65, 3, 63, 129)


def pieces(length: int, form: Form) -> Iterator[slice]:
    """Slices of ``length`` tokens.

    ``parallel`` is one prefill, ``recurrent`` a prefill in uneven pieces through the cache,
    ``step`` one token a call.
    """
    sizes = cycle({"parallel": (max(length, 1),), "recurrent": _RECURRENT, "step": (1,)}[form])
    start = 0
    while start < length:
        stop = min(start + next(sizes), length)
        yield slice(start, stop)
        start = stop
