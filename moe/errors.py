"""Every error that this program raises on purpose, with the exit status that the command line gives it.

A message is one line that names what is wrong, its value, and the remedy. What is not listed here is either a misuse of
a function (a plain ValueError or TypeError, described in its docstring) or a bug. Imports nothing.
"""


class MoeError(Exception):
    """The base of them all."""

    exit_status = 1


class ConfigError(MoeError, ValueError):
    """A configuration or an argument that cannot be: the message names the field, the value and the remedy."""

    exit_status = 2


class DataError(MoeError, ValueError):
    """Data that cannot be read, prepared or used; the message names the file or field and the remedy."""


class TokenizerError(MoeError, ValueError):
    """A tokenizer that cannot be trained, read or applied; the message says what would be right."""


class CheckpointError(MoeError, ValueError):
    """A checkpoint that cannot be read or written; the message names the file and the remedy."""


class HFError(CheckpointError):
    """A model that another family, or this program, cannot express: the field, the value and the remedy."""


class InUseError(MoeError, RuntimeError):
    """A directory that another process works in; the message names the process and the remedy."""


class TrainError(MoeError, RuntimeError):
    """A run that cannot go on; the message says why, what is left, and what to change."""


class LaunchError(MoeError, RuntimeError):
    """Ranks that ended in an error: which one did first, and its traceback. The exit status is that rank's."""

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class NotObservable(MoeError, ValueError):
    """A model without a router that is known here."""


class TraceError(MoeError, ValueError):
    """A trace that cannot be read, written or replayed; the message names the file and the remedy."""


class SubjectError(MoeError, ValueError):
    """A model and a text that do not go together; the message names the file and the remedy."""


class ServeError(MoeError, RuntimeError):
    """A request that the engine could not serve; the message says which, and its cause is the error that was met."""


class QueueFullError(ServeError):
    """More requests wait than the engine lets wait: try again later."""
