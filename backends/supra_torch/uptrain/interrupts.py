"""Ctrl-C at a moment that suits: an optimiser step moves all weights or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def deferred_interrupts(noticed: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold SIGINT back until the block is done, then let it do what it would have done.

    ``noticed`` is called when it comes, at most once.
    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            # A line that was being written when the signal came cannot be begun again.
            with suppress(RuntimeError):
                noticed()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        # None: a handler that C code installed, which Python cannot put back.
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if received:
        signal.raise_signal(signal.SIGINT)
