"""Small corpora on disk, and the hold-out rule worked out by hand."""

import hashlib
from pathlib import Path

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "a",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "his",
    "they",
]


def held_out_by_hand(name: str) -> bool:
    """The rule in other arithmetic: 16^k mod 20 is 16 for every k > 0, so only digit sums matter."""
    digits = [int(d, 16) for d in hashlib.sha256(name.encode()).hexdigest()]
    return (digits[-1] + 16 * sum(digits[:-1])) % 20 == 0


def write_corpus(root: Path, n_files: int, words_per_file: int = 60) -> dict[str, str]:
    """Writes n_files texts in nested directories; returns {relative name: text}."""
    texts = {}
    for i in range(n_files):
        name = f"part{i % 3}/doc{i:03d}.txt"
        words = [WORDS[(i * 7 + j * j * (i + 1)) % len(WORDS)] for j in range(words_per_file + i)]
        texts[name] = f"Document {i}\r\n" + " ".join(words) + "\n"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(texts[name].encode())
    return texts
