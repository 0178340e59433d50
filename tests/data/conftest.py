"""Small corpora and a small prepared directory that several tests read."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moe.data import TokenData, prepare
from tests.data.small_corpus import write_corpus


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sources, "prose" of 60 and "verse" of 45 documents."""
    roots = {name: tmp_path_factory.mktemp(name) for name in ("prose", "verse")}
    write_corpus(roots["prose"], 60)
    write_corpus(roots["verse"], 45, words_per_file=25)
    return roots


@pytest.fixture(scope="session")
def data(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Both corpora, prepared with a vocabulary of 320 in shards of 1,000 tokens."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare([f"{name}={path}" for name, path in corpora.items()], out, vocab_size=320, shard_tokens=1000)
    return TokenData.open(out)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a corpus of some files under tmp_path/corpus and returns its path."""

    def make(n_files: int = 60, words_per_file: int = 60) -> Path:
        write_corpus(tmp_path / "corpus", n_files, words_per_file)
        return tmp_path / "corpus"

    return make
