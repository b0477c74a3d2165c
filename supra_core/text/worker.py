"""A child process in which strangers' tokenizers and chat templates compute.

A tokenizer.json holds regular expressions and replacements, a template is a program: either can
take unlimited time or memory, and native code does not react to Ctrl-C. So they run in a child
process that the system ends at a limit. A parent has two children, one for short texts and one for
long ones, which start when they are needed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError, SupraError

Arrays = list[npt.NDArray[np.int64]]
# The result of a job: a value that JSON can hold, and arrays.
Result = tuple[Any, Arrays]
# Answers a job by its name and arguments.
Answers = Callable[[str, Sequence[Any]], Result]

# Seconds of computing for a job, and characters of text for each further second.
SECONDS, CHARACTERS_PER_SECOND = 10, 50_000
# Characters above which a text is a long one.
LONG = 20_000
# Bytes of address space; macOS has no such limit.
MEMORY = 4 << 30
# Tokenizers and templates that the child keeps loaded.
_KEPT = 4

_START = (
    "import sys; sys.path[:] = {path!r}; from supra_core.text.worker import serve; serve({pipe})"
)
_ERRORS: dict[str, type[Exception]] = {
    "SupraError": SupraError, "FormatError": FormatError, "RuntimeError": RuntimeError,
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """How the child makes its :data:`Answers`: by ``maker``(``fields``, ``content``).

    ``maker`` is named as module:function; JSON must be able to hold ``fields``.
    """

    maker: str
    fields: Mapping[str, Any]
    content: bytes

    @cached_property
    def key(self) -> str:
        """A hash of the description."""
        stated = json.dumps([self.maker, dict(self.fields)], sort_keys=True)
        return hashlib.sha256(stated.encode() + self.content).hexdigest()


class Worker:
    """The child process, as the parent sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._owner = 0
        self._known: list[str] = []

    def ask(self, described: Described, job: str, given: Sequence[Any], characters: int) -> Result:
        """The result of ``job``; raises SupraError or FormatError as the job does.

        ``characters``: of the text, for the time. FormatError where a limit ends the child.
        """
        with self._lock:
            process = self._running()
            new = described.key not in self._known
            head = {
                "key": described.key, "maker": described.maker if new else None,
                "fields": dict(described.fields) if new else None, "job": job, "given": given,
                "seconds": SECONDS + characters / CHARACTERS_PER_SECOND, "long": characters > LONG,
            }  # fmt: skip
            try:
                _send(self._pipe, json.dumps(head).encode(), described.content if new else b"")
                answer, *arrays = _receive(self._pipe)
            except (OSError, EOFError):
                raise self._ended(process, job) from None
            except BaseException:
                # Else the next question would get this one's answer.
                self._end(process)
                raise
            found = json.loads(answer)
            if new and found["made"]:
                self._known = [*self._known, described.key][-_KEPT:]
        if "error" in found:
            raise _ERRORS[found["kind"]](found["error"])
        return found["value"], [np.frombuffer(array, dtype=np.int64).copy() for array in arrays]

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the pipe is the parent's.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._known, self._owner = [], os.getpid()
            self._pipe, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _START.format(path=sys.path, pipe=theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    # Ctrl-C is for the parent, which ends the child.
                    start_new_session=True,
                )
        return self._process

    def _ended(self, process: subprocess.Popen[bytes], job: str) -> FormatError:
        code = process.wait()
        self._process = None
        what = "chat template" if job == "render" else "tokenizer"
        reason = "takes too long" if code == -signal.SIGPROF else "takes too much memory"
        return FormatError(
            f"the model's {what} {reason} for this text, so it was ended: shorten the text, or get "
            "the model from elsewhere"
        )

    def end(self) -> None:
        """End the child; the next question starts another."""
        with self._lock:
            if self._process is not None:
                self._end(self._process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self._process = None


WORKER = Worker()
_FOR_LONG_TEXTS = Worker()


def worker_for(characters: int) -> Worker:
    """The child for a text of that length: a short one never waits for a long one."""
    return WORKER if characters <= LONG else _FOR_LONG_TEXTS


def serve(pipe: int, memory: int = MEMORY) -> None:
    """The child's side: jobs and answers by the descriptor ``pipe``, until it closes.

    ``memory``: bytes of address space.
    """
    asking = Connection(pipe)
    # A core dump of gigabytes is of no use.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    # Not every system has such a limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    made: dict[str, Answers] = {}
    while True:
        try:
            head, content = _receive(asking)
        except (EOFError, ConnectionError):
            return
        asked = json.loads(head)
        # The default action of the signal ends the process even in native code.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        answer = _answered(made, asked, content)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(asking, *answer)
        if asked["long"]:
            del asked, head, answer
            trim()


def trim() -> None:
    """Return freed memory to the system: glibc would keep it for the next long text."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answered(made: dict[str, Answers], asked: dict[str, Any], content: bytes) -> list[bytes]:
    try:
        if asked["maker"] is not None:
            made[asked["key"]] = resolve_name(asked["maker"])(asked["fields"], content)
            for key in list(made)[:-_KEPT]:
                del made[key]
        value, arrays = made[asked["key"]](asked["job"], asked["given"])
    except MemoryError:
        os.abort()
    # Any error but of the input is the program's, and reported as it is.
    except Exception as error:
        kinds = (FormatError, SupraError)
        kind = next((k.__name__ for k in kinds if isinstance(error, k)), "RuntimeError")
        message = str(error) if kind != "RuntimeError" else f"{type(error).__name__}: {error}"
        problem = {"error": message, "kind": kind, "made": asked["key"] in made}
        return [json.dumps(problem).encode()]
    head = json.dumps({"value": value, "made": True})
    return [head.encode(), *(array.tobytes() for array in arrays)]


def _send(pipe: Connection, *parts: bytes) -> None:
    pipe.send_bytes(str(len(parts)).encode())
    for part in parts:
        pipe.send_bytes(part)


def _receive(pipe: Connection) -> list[bytes]:
    return [pipe.recv_bytes() for _ in range(int(pipe.recv_bytes()))]
