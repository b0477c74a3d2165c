"""The errors a user can cause; each message is one sentence with the remedy in it."""


class SupraError(Exception):
    """Bad input. The command line prints the message and exits with code 2."""


class SpecError(SupraError):
    """A model description that cannot exist, or a config that does not describe a model."""


class FormatError(SupraError):
    """A file that is damaged, unsafe, or not in the format it claims."""


class LayoutError(SupraError):
    """Tensors that do not match the spec: missing, unexpected or misshapen."""


class MissingDependencyError(SupraError):
    """An optional package is needed and absent; the message says what to install."""


class WriteError(SupraError):
    """An output that the system does not let be written: no room, or no permission."""


class EndedByAnother(SupraError):  # noqa: N818 - the error is another process's
    """Another process of the same run failed, and says why: this one has nothing to add."""


class Preempted(BaseException):  # noqa: N818 - like KeyboardInterrupt, no error
    """The process was told to end (SIGTERM), and saved what it had: start it again."""
