"""The errors a user can cause; each message is one sentence with the remedy in it."""

from __future__ import annotations

from typing import Self

from supra_core.visible import visible

# Characters of a message; what a file says about itself may be longer than any terminal.
MESSAGE_LENGTH = 4000


class SupraError(Exception):
    """Bad input. The command line prints the message and exits with code 2.

    A message may quote a stranger's file: it is cut to :data:`MESSAGE_LENGTH`, and characters
    that would break its line or steer the terminal are written as escapes.
    """

    def __init__(self, message: object = "", *rest: object) -> None:
        super().__init__(visible(_cut(str(message))), *rest)


def _cut(message: str) -> str:
    if len(message) <= MESSAGE_LENGTH:
        return message
    half = MESSAGE_LENGTH // 2
    return f"{message[:half]} ... {message[-half:]}"


class SpecError(SupraError):
    """A model description that cannot exist, or a config that does not describe a model."""


class FormatError(SupraError):
    """A file that is damaged, unsafe, or not in the format it claims."""


class LayoutError(SupraError):
    """Tensors that do not match the spec: missing, unexpected or misshapen."""


class MissingDependencyError(SupraError):
    """An optional package is needed and absent; the message says what to install."""

    @classmethod
    def of(cls, package: str, purpose: str, extra: str) -> Self:
        """That ``purpose`` needs a package, which the extra of that name brings."""
        return cls(f"{purpose} needs {package}: install it with {install(extra)}")


def install(extra: str) -> str:
    """How the packages of an extra are installed."""
    return f"pip install 'supra-lm[{extra}]'"


class WriteError(SupraError):
    """An output that the system does not let be written: no room, or no permission."""


class EndedByAnother(SupraError):  # noqa: N818 - the error is another process's
    """Another process of the same run failed, and says why: this one has nothing to add."""


class Preempted(BaseException):  # noqa: N818 - like KeyboardInterrupt, no error
    """SIGTERM stopped the process after it saved its state: run the same command to resume."""
