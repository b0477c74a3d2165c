"""A log that clients cannot flood: a few lines of each kind a minute."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from supra_cli.shared.output import log, log_failure

# Lines of one kind a minute, and kinds that are counted separately.
_MOST, _KINDS = 10, 100


class Seldom:
    """Limits lines of one kind."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began: float = clock()
        self._told: dict[str, int] = {}

    def shows(self, kind: str) -> bool:
        """Whether a line of the kind is to be shown now."""
        with self._lock:
            now, left_out = self._clock(), 0
            if now - self._began >= 60:
                left_out = sum(max(0, count - _MOST) for count in self._told.values())
                self._began, self._told = now, {}
            if kind not in self._told and len(self._told) >= _KINDS:
                kind = ""
            self._told[kind] = self._told.get(kind, 0) + 1
            shown = self._told[kind] <= _MOST
        if left_out:
            log(f"{left_out:,} more lines like these were omitted")
        return shown

    def log(self, kind: str, line: str) -> None:
        """Show a line, unless there were many of its kind."""
        if self.shows(kind):
            log(line)

    def failure(self, error: BaseException) -> None:
        """As :func:`log_failure`, a few times a minute."""
        if self.shows(f"failure {type(error).__name__}"):
            log_failure(error)

    def filter(self, record: logging.LogRecord) -> bool:
        """A logger's filter; records with one format are one kind."""
        return self.shows(str(record.msg))

    def heard(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's handler of errors outside requests, such as those of connections."""
        error = context.get("exception")
        what = f"{context.get('message')}" + (f" ({error})" if error else "")
        self.log(f"loop {type(error).__name__}", f"connections: {what}")
