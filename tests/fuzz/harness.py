"""One check for all fuzz tests: a file is read, or refused in one line; nothing else happens.

While the reader runs it has five seconds, may add 512 MiB to the process, may open no file for
writing and none for reading outside the model's folder, and may start or connect to nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.errors import SupraError
from supra_core.sources.source import open_source
from supra_core.text import worker
from supra_core.visible import visible

SECONDS = 5
# Of computing, for each text that the process of its own is asked to encode or render.
WORKER_SECONDS = 0.3
MEMORY = 512 * 2**20
ROOT = Path(__file__).resolve().parents[2]

# What a model comes as: the files of its folder, by name.
Files = Mapping[str, bytes]
Reader = Callable[[Path], object]
T = TypeVar("T")


class Violation(AssertionError):
    """The reader did what it must not."""


class _Watch:
    """What the interpreter reports of the reader's doings, while there is one."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event == "subprocess.Popen" and _is_worker(*arguments[1]):
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if isinstance(path, int) or _is_scratch(path):
                return
            # What the worker's process has for its errors: mode is None where no file object is.
            if (path, mode) == (os.devnull, None):
                return
            place = os.path.realpath(os.fsdecode(path))
            if writes or not place.startswith(self.allowed):
                self.seen.append(f"open {place} {mode}")
        elif event.startswith(_FORBIDDEN) and not (
            _is_scratch(*arguments[:1]) or _is_relative(arguments)
        ):
            self.seen.append(f"{event} {arguments!r:.200}")


_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.",
    "socket.connect", "socket.bind", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link",
    "os.symlink", "os.chmod", "os.truncate", "shutil.", "pty.", "pickle.find_class",
    "webbrowser.", "urllib.",
)  # fmt: skip
_SCRATCH = os.path.realpath(tempfile.gettempdir()) + os.sep + "tmp"


def _is_scratch(path: object = None) -> bool:
    """Whether this is a temporary folder of the library that converts a GGUF's tokenizer."""
    return isinstance(path, str | Path) and os.path.realpath(path).startswith(_SCRATCH)


def _is_relative(arguments: tuple[Any, ...]) -> bool:
    """Whether a file is removed by the descriptor of its folder, as such a folder's are."""
    return len(arguments) == 2 and isinstance(arguments[1], int) and arguments[1] >= 0


def _is_worker(program: str, *options: str) -> bool:
    begin = _START.partition("{pipe}")[0].format(path=sys.path)
    return program == sys.executable and options[0] == "-c" and options[1].startswith(begin)


# Hooks cannot be removed: one for the process.
_WATCH = _Watch()


@dataclass(frozen=True)
class Format:
    """``cases``: files, and the name of the one to open, none for the folder.

    ``drawn`` makes such a case of a generator of random numbers, for who needs very many.
    """

    name: str
    cases: Callable[[], st.SearchStrategy[tuple[Files, str]]]
    read: Reader
    drawn: Callable[[Random], tuple[Files, str]] | None = None

    @classmethod
    def seeded(
        cls, name: str, drawn: Callable[[Random], tuple[Files, str]], read: Reader
    ) -> Format:
        """Whose ``cases`` are drawn so, too."""
        return cls(name, lambda: st.integers(0, 2**64 - 1).map(Random).map(drawn), read, drawn)


def read_as_convert(path: Path) -> object:
    """What ``supra convert`` does with a source before it writes: all of it is read."""
    source = open_source(path)
    tensors = {**source.tensors, **source.originals}
    if source.spec.is_transformer:
        tensors |= linearize(source.spec, source.tensors, LinearizeOptions())[1]
    for tensor in tensors.values():
        tensor.read()
    return source.assets()


def assert_refused_or_read(path: Path, read: Reader = read_as_convert) -> bool:
    """Whether ``path`` could be read; :class:`Violation` unless it was refused properly."""
    warm_up()
    folder = path if path.is_dir() else path.parent
    before = _listing(folder.parent)
    _WATCH.seen.clear()
    try:
        with _watched_worker(), _limits(), _watched(folder):
            read(path)
        was_read = True
    except SupraError as error:
        was_read = False
        check_line(error)
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if type(error).__name__ == "PanicException":
            raise Violation(f"panic: {error}") from error
        raise
    if _WATCH.seen:
        raise Violation(f"forbidden: {_WATCH.seen[:5]}")
    if _listing(folder.parent) != before:
        raise Violation("the folder is not as it was")
    return was_read


def check_line(error: Exception) -> None:
    """:class:`Violation` unless the error's message is one line for a user."""
    message = str(error)
    if len(message.splitlines()) != 1 or visible(message) != message or len(message) > 5000:
        raise Violation(f"no line for a user: {message!r:.300}") from error


def tried(refused: list[SupraError], action: Callable[[], T]) -> T | None:
    """What ``action`` gives; None where it refuses, which is noted in ``refused``."""
    try:
        return action()
    except SupraError as error:
        check_line(error)
        refused.append(error)
        return None


_START = "import sys; sys.path[:] = {path!r}; from tests.fuzz.child import serve; serve({pipe})"
_OWN_WORKER = worker.Worker()


@contextlib.contextmanager
def _watched_worker() -> Iterator[None]:
    """Tokenizers and templates in a process that reports what it must not do, with less time."""
    kept = worker.WORKER.__dict__
    worker.WORKER.__dict__ = _OWN_WORKER.__dict__
    changes = {"_START": _START, "SECONDS": WORKER_SECONDS}
    changes["_ERRORS"] = {**worker._ERRORS, "Violation": Violation}
    before = {name: getattr(worker, name) for name in changes}
    for name, value in changes.items():
        setattr(worker, name, value)
    try:
        yield
    finally:
        worker.WORKER.__dict__ = kept
        for name, value in before.items():
            setattr(worker, name, value)


def check_files(
    files: Files, name: str = "", read: Reader = read_as_convert, place: Path | None = None
) -> bool:
    """Write ``files`` to a new folder and check it, or its file ``name``."""
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=place) as parent:
        folder = Path(parent) / "model"
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return assert_refused_or_read(folder / name if name else folder, read)


@functools.cache
def warm_up() -> None:
    """Import what readers import late, so that the limits are those of the reader alone."""
    import gguf  # noqa: F401
    import gguf.quants  # noqa: F401

    with contextlib.suppress(ImportError):
        import transformers.integrations.gguf  # noqa: F401
        from transformers import PreTrainedTokenizerFast  # noqa: F401
    with contextlib.suppress(ImportError):
        import supra_torch.inference.backend  # noqa: F401


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    found = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stat = entry.stat(follow_symlinks=False)
        found.append((entry.path, stat.st_size, stat.st_mtime_ns))
        if entry.is_dir(follow_symlinks=False):
            found += _listing(Path(entry.path))
    return found


@functools.cache
def _libraries() -> set[str]:
    libraries = {sys.prefix, sys.base_prefix, str(ROOT), os.path.realpath(ROOT / ".venv"), "/proc"}
    return libraries | {os.path.realpath(place) for place in sys.path if place}


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[None]:
    _WATCH.allowed = (os.path.realpath(folder), *_libraries())
    try:
        yield
    finally:
        _WATCH.allowed = None


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def out_of_time(*_: object) -> None:
        # Who catches whatever a stranger's file leads to would catch this.
        _WATCH.seen.append(f"more than {SECONDS} seconds")
        raise Violation(_WATCH.seen[-1])

    statm = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, out_of_time)
    if statm.exists():
        held = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
