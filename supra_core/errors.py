"""The errors that a user can cause; each message is one sentence that includes the remedy."""

from __future__ import annotations

from typing import Self

from supra_core.visible import visible

# Characters of a message: a quoted file may be longer than any terminal.
MESSAGE_LENGTH = 4000


class SupraError(Exception):
    """Bad input. The command line prints the message and exits with code 2.

    A message may quote a stranger's file: it is cut to :data:`MESSAGE_LENGTH`, and characters
    that would break its line or control the terminal are written as escapes.
    """

    def __init__(self, message: object = "", *rest: object) -> None:
        text, half = str(message), MESSAGE_LENGTH // 2
        if len(text) > MESSAGE_LENGTH:
            text = f"{text[:half]} ... {text[-half:]}"
        super().__init__(visible(text), *rest)


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
        """The error that ``purpose`` needs ``package``, which ``extra`` installs."""
        return cls(f"{purpose} needs {package}: install it with {install(extra)}")


def install(extra: str) -> str:
    """The command that installs the packages of an extra."""
    return f"pip install 'supra-lm[{extra}]'"


def reason(error: BaseException) -> str:
    """What an exception says, in one line, without the system's error number."""
    said = getattr(error, "strerror", None) or str(error)
    return (said.splitlines() or [type(error).__name__])[0]


class WriteError(SupraError):
    """An output cannot be written: the disk is full, or permission is missing."""


class EndedByAnother(SupraError):  # noqa: N818 - the error is another process's
    """Another process of the same run failed and says why."""


class Preempted(BaseException):  # noqa: N818 - like KeyboardInterrupt, no error
    """SIGTERM stopped the process after it saved its state: run the same command to resume."""
