"""Ctrl-C and SIGTERM at a moment that suits: an optimiser step moves all weights or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from supra_core.errors import Preempted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Holds both signals back inside its block; the loop looks for them between two steps.

    ``noticed`` is called when the first one comes. A second Ctrl-C interrupts at once. Outside
    the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self, noticed: Callable[[], None] = lambda: None) -> None:
        self._noticed = noticed
        self._before: dict[int, Any] = {}
        self.received: set[int] = set()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that C code installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def flags(self) -> list[float]:
        """1.0 for each of SIGINT and SIGTERM that has come, so that processes can agree."""
        return [float(number in self.received) for number in _SIGNALS]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        first, self.received = not self.received, self.received | {number}
        if first:
            # A line that was being written when the signal came cannot be begun again.
            with suppress(RuntimeError):
                self._noticed()


def stop_if_asked(flags: list[float]) -> None:
    """Raise KeyboardInterrupt or Preempted where any process's :meth:`Stop.flags` are set."""
    interrupted, terminated = flags
    if terminated:
        raise Preempted
    if interrupted:
        raise KeyboardInterrupt
