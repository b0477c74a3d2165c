"""The process of its own for tokenizers and templates, as the harness starts it: it is watched."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from supra_core.text import worker
from supra_core.text.worker import Result

# Bytes of address space: the harness' inputs are small.
MEMORY = 2 << 30
# Where Python looks for the lines that a warning is about: of a template in no file.
_ALLOWED = (sys.prefix, sys.base_prefix, *filter(None, sys.path), "<")
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "socket.",
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod",
    "os.truncate", "shutil.", "pty.", "pickle.find_class", "webbrowser.", "urllib.", "ctypes.",
)  # fmt: skip


def serve(pipe: int) -> None:
    """As :func:`supra_core.text.worker.serve`; what is no answer comes as a Violation."""
    plain, seen = worker._answered, list[str]()

    def watched(event: str, arguments: tuple[Any, ...]) -> None:
        outside = event == "open" and not str(arguments[0]).startswith(_ALLOWED)
        if outside or event.startswith(_FORBIDDEN):
            seen.append(f"{event} {arguments!r:.200}")

    def answered(made: dict[str, Any], asked: dict[str, Any], content: bytes) -> list[bytes]:
        seen.clear()
        try:
            answer = plain(made, asked, content)
            if (told := json.loads(answer[0])).get("kind") == "RuntimeError":
                seen.append(told["error"])
        except BaseException:
            seen.append(traceback.format_exc())
        if not seen:
            return answer
        told = {"error": "; ".join(seen), "kind": "Violation", "made": asked["key"] in made}
        return [json.dumps(told).encode()]

    worker._answered = answered
    sys.addaudithook(watched)
    worker.serve(pipe, MEMORY)


def opening(fields: Mapping[str, Any], content: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """What answers by opening a file, or by an error that is none of supra's."""
    return lambda job, given: (open(fields["path"]).read(), [])  # noqa: SIM115
