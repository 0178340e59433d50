"""A corpus of a few kilobytes and a model of a few thousand parameters, which train in seconds."""

import random
from pathlib import Path

import pytest

from moe import Config, load_config
from moe.data import is_held_out, prepare

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "mat",
    "saw",
    "two",
    "birds",
    "fly",
    "over",
    "old",
    "house",
    "while",
    "rain",
    "fell",
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared sources, each with held-out documents, vocabulary 300."""
    root = tmp_path_factory.mktemp("train-data")
    rng = random.Random(0)
    for source in ("prose", "verse"):
        (root / source).mkdir()
        names = [f"{i}.txt" for i in range(80)]
        assert any(is_held_out(name) for name in names)
        for name in names:
            text = " ".join(rng.choice(WORDS) for _ in range(60)) + (" é\n" if source == "verse" else ".\n")
            (root / source / name).write_text(text, encoding="utf-8")
    prepare([root / "prose", root / "verse"], root / "prepared", vocab_size=300)
    return root / "prepared"


@pytest.fixture
def cfg() -> Config:
    """One layer, 64 wide, 4 experts; 8 steps of 4 x 16 tokens."""
    shape = ["d_model=64", "n_layers=1", "vocab_size=300", "max_seq_len=32", "attention.n_heads=2"]
    shape += ["attention.head_dim=16", "experts.n_experts=4", "experts.d_ff=64"]
    recipe = ["steps=8", "seq_len=16", "batch_size=4", "warmup=2", "lr=3e-3", "log_every=1", "eval_every=4"]
    recipe += ["eval_tokens=256", "save_every=4", "dtype=fp32"]
    return load_config("replica-tiny").with_overrides([*shape, *(f"train.{r}" for r in recipe)])


@pytest.fixture
def cfg_file(cfg: Config, tmp_path: Path) -> Path:
    """The same as a file, for the command line."""
    file = tmp_path / "small.toml"
    file.write_text(cfg.to_toml(), encoding="utf-8")
    return file
