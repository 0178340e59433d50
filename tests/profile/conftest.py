"""A corpus of two sources for the command line's tests."""

from pathlib import Path

from moe.data import prepare


def two_sources(root: Path) -> None:
    """Writes prose and code of forty documents each below `root`, prepared in `root`/data with 300 ids."""
    for source, word in (("prose", "and so it was that"), ("code", "def f(x): return x")):
        (root / source).mkdir()
        for i in range(40):
            (root / source / f"{i}.txt").write_text(f"{word} {i} " * (20 + i))
    prepare([f"prose={root / 'prose'}", f"code={root / 'code'}"], root / "data", vocab_size=300)
