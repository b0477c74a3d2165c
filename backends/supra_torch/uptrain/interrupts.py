"""Ctrl-C and SIGTERM between steps: an optimiser step moves all weights or none."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from supra_core.errors import Preempted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Inside its block, Ctrl-C raises KeyboardInterrupt and SIGTERM raises Preempted.

    At once, or inside :meth:`held` when the loop asks for them. A second SIGTERM is ignored:
    schedulers send it to every process, and so does torchrun. A second Ctrl-C interrupts at once,
    maybe in the middle of an optimiser step, and sets ``is_forced``.
    Outside the main thread, where Python delivers no signals, nothing changes.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: set[int] = set()
        self._noticed: Callable[[], None] = lambda: None
        self.is_held = self.is_forced = False

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: a handler that C code installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def held(self, noticed: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Signals wait until :meth:`flags` is read, or for the end of the block.

        ``noticed`` is called when the first one comes.
        """
        self._noticed, self.is_held = noticed, True
        try:
            yield
        finally:
            self.is_held = False
        stop_if_asked(self.flags())

    def flags(self) -> list[float]:
        """1.0 for each of SIGINT and SIGTERM that was received, so that processes can agree."""
        return [float(number in self._received) for number in _SIGNALS]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in self._received:
            if number == signal.SIGINT:
                self.is_forced = True
                raise KeyboardInterrupt
            return
        first, self._received = not self._received, self._received | {number}
        if not self.is_held:
            stop_if_asked(self.flags())
        elif first:
            # The signal may have interrupted a line that is being written.
            with suppress(RuntimeError):
                self._noticed()


def stop_if_asked(flags: list[float]) -> None:
    """Raise KeyboardInterrupt or Preempted where any process's :meth:`Stop.flags` are set."""
    interrupted, terminated = flags
    if terminated:
        raise Preempted
    if interrupted:
        raise KeyboardInterrupt
