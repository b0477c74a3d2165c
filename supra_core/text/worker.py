"""A process of its own for what strangers' tokenizers and chat templates compute.

A tokenizer.json holds regular expressions and replacements, a template is a program: either can
take all time or all memory, and native code does not hear Ctrl-C. So they run in a child process
that the system ends at a limit. Everything of one parent shares two children, one for short texts
and one for long ones, which are started when they are first needed and again when they were ended.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError, SupraError

Arrays = list[npt.NDArray[np.int64]]
# What a job gives: a value that JSON can hold, and arrays.
Result = tuple[Any, Arrays]
# Makes of a description, which JSON can hold, and a file's content what answers jobs by name.
Maker = Callable[[Mapping[str, Any], bytes], Callable[[str, Sequence[Any]], Result]]

# Seconds of computing for a job, and characters for which it gets one more.
SECONDS, CHARACTERS_PER_SECOND = 10, 50_000
# Characters of a text that is a long one.
LONG = 20_000
# Bytes of address space; macOS keeps no such limit.
MEMORY = 4 << 30
# Descriptions that the child keeps made.
_KEPT = 4

_SIZE = struct.Struct("<Q")
_START = (
    "import sys; sys.path[:] = {path!r}; from supra_core.text.worker import serve; serve({memory})"
)
_ERRORS: dict[str, type[Exception]] = {
    "SupraError": SupraError, "FormatError": FormatError, "RuntimeError": RuntimeError,
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """What answers jobs: ``maker``, as module:function, called with ``fields`` and ``content``."""

    maker: str
    fields: Mapping[str, Any]
    content: bytes

    @cached_property
    def key(self) -> str:
        """The same for the same description."""
        told = json.dumps([self.maker, dict(self.fields)], sort_keys=True)
        return hashlib.sha256(told.encode() + self.content).hexdigest()


class Worker:
    """The child process, from the parent's side."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._known: list[str] = []

    def ask(self, described: Described, job: str, given: Sequence[Any], characters: int) -> Result:
        """What ``job`` gives; SupraError or FormatError as it raises them.

        ``characters``: of the text, for the time. Raises FormatError where a limit ends the child.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            new = described.key not in self._known
            head = {
                "key": described.key, "maker": described.maker if new else None,
                "fields": dict(described.fields) if new else None, "job": job, "given": given,
                "seconds": SECONDS + characters / CHARACTERS_PER_SECOND, "long": characters > LONG,
            }  # fmt: skip
            try:
                _send(process.stdin, json.dumps(head).encode(), described.content if new else b"")
                answer, *arrays = _receive(process.stdout)
            except (OSError, EOFError):
                raise self._ended(process, job) from None
            except BaseException:
                # It would answer the next question with this one's answer.
                self._end(process)
                raise
            found = json.loads(answer)
            if new and found["made"]:
                self._known = [*self._known, described.key][-_KEPT:]
        if "error" in found:
            raise _ERRORS[found["kind"]](found["error"])
        return found["value"], [np.frombuffer(array, dtype=np.int64).copy() for array in arrays]

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes are the parent's.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self._known, self._owner = [], os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START.format(path=sys.path, memory=MEMORY)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
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


def serve(memory: int) -> None:
    """The child's side: jobs from standard input, answers to standard output, until it closes.

    ``memory``: bytes of address space.
    """
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints is no answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # A core of gigabytes is of no use.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    # Not every system keeps such a limit.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    made: dict[str, Callable[[str, Sequence[Any]], Result]] = {}
    while True:
        try:
            head, content = _receive(source)
        except EOFError:
            return
        asked = json.loads(head)
        # Its default action ends the process, in native code, too.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        answer = _answered(made, asked, content)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(sink, *answer)
        if asked["long"]:
            del asked, head, answer
            trim()


def trim() -> None:
    """Give the system back what was freed: glibc would keep it for the next long text."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answered(made: dict[str, Any], asked: dict[str, Any], content: bytes) -> list[bytes]:
    try:
        if asked["maker"] is not None:
            made[asked["key"]] = _maker(asked["maker"])(asked["fields"], content)
            for key in list(made)[:-_KEPT]:
                del made[key]
        value, arrays = made[asked["key"]](asked["job"], asked["given"])
    except MemoryError:
        os.abort()
    # What is no error of the input is one of the program, and told as it is.
    except Exception as error:
        kinds = (FormatError, SupraError)
        kind = next((k.__name__ for k in kinds if isinstance(error, k)), "RuntimeError")
        message = str(error) if kind != "RuntimeError" else f"{type(error).__name__}: {error}"
        told = {"error": message, "kind": kind, "made": asked["key"] in made}
        return [json.dumps(told).encode()]
    head = json.dumps({"value": value, "made": True})
    return [head.encode(), *(array.tobytes() for array in arrays)]


def _maker(name: str) -> Maker:
    from importlib import import_module

    module, _, function = name.partition(":")
    found: Maker = getattr(import_module(module), function)
    return found


def _send(sink: IO[bytes], *parts: bytes) -> None:
    sink.write(_SIZE.pack(len(parts)))
    for part in parts:
        sink.write(_SIZE.pack(len(part)))
        sink.write(part)
    sink.flush()


def _receive(source: IO[bytes]) -> list[bytes]:
    (count,) = _SIZE.unpack(_exactly(source, _SIZE.size))
    return [_exactly(source, _SIZE.unpack(_exactly(source, _SIZE.size))[0]) for _ in range(count)]


def _exactly(source: IO[bytes], size: int) -> bytes:
    found = source.read(size)
    if len(found) < size:
        raise EOFError
    return found
