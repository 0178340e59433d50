"""What commands write to a terminal or a pipe. The standard library only."""

import sys


def write(text: str) -> None:
    """Writes to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def printable(text: str) -> str:
    """Text for a terminal: a model may write escape sequences. What goes to a file or a pipe is left as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
