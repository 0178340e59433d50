"""Named spans of time inside the ops, for whoever measures them (moe/profile/stopwatch.py).

With nobody listening a span is an empty context, a tenth of a microsecond. The listener is the process's: a backward
runs in threads of autograd's own, which see no context variables.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

# (component, phase) -> a context around that piece of work.
Listener = Callable[[str, str], AbstractContextManager[object]]

_SILENCE = nullcontext()
_listener: Listener | None = None


def span(component: str, phase: str = "forward") -> AbstractContextManager[object]:
    """A context for one piece of work: "permute", "up", "down", "combine", "head"; "forward" or "backward"."""
    return _SILENCE if _listener is None else _listener(component, phase)


def heard() -> bool:
    """Whether somebody listens."""
    return _listener is not None


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, every span is entered through `listener`.

    Raises:
        RuntimeError: somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("the spans of the ops are being measured already; end that measurement first")
    _listener = listener
    try:
        yield
    finally:
        _listener = None
