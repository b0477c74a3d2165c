"""Only one process group trains in a folder at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from supra_core.errors import SupraError
from supra_core.sources.source import RUN_FILE

# Processes that were stopped may still be writing their checkpoint; torchrun gives them 30 s.
_PATIENCE = 30.0


class Lock:
    """A lock on the run's own file, which the system releases however the process ends."""

    def __init__(self, run: Path, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._file: BinaryIO | None = None

    def take(self) -> None:
        """Take the lock if the run exists.

        Raises SupraError when another process has kept the lock for half a minute. Does nothing on
        file systems without locks.
        """
        file = self._run / RUN_FILE
        if not file.is_file() or self._holds(file):
            return
        self.release()
        try:
            self._file = open(file, "r+b")  # noqa: SIM115 - open as long as the run goes on
            self._wait(self._file)
        except BlockingIOError:
            raise SupraError(
                f"{self._run} is being trained by another process: wait for it to end, or stop it"
            ) from None
        except OSError:
            return

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds(self, file: Path) -> bool:
        """Whether the lock is on this file, not on one that another has replaced since."""
        if self._file is None:
            return False
        return os.path.samestat(os.fstat(self._file.fileno()), file.stat())

    def _wait(self, file: BinaryIO) -> None:
        deadline, said = time.monotonic() + _PATIENCE, False
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
            if not said:
                self._say(f"{self._run} is in use: waiting for the process that trains there")
                said = True
            time.sleep(0.2)
