"""What the tests share: an error measure that has no scale, tiny models, a small prepared corpus, one thread."""

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.pop("COLUMNS", None)  # a terminal's width, which pytest-xdist sets; the tests print as into a pipe

from moe.config import AttentionConfig, Config, ExpertsConfig, load_config
from moe.data import is_held_out, prepare

ROOT = Path(__file__).parent.parent

# The tensors here are tiny: more threads only wait for each other, the more so under pytest -n.
torch.set_num_threads(1)
# A time limit per example would make results depend on how busy the machine is.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("tests")
# A shell's background job ignores Ctrl-C, which training, started in one, rightly leaves so: the tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Training in this process sets denormal numbers to zero (moe.device.tune_cpu); the next test has them again."""
    yield
    torch.set_flush_denormal(False)


def rel(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements in float64: 0 when both are all zeros, inf where `got` is not finite."""
    assert got.shape == want.shape, f"{list(got.shape)} against {list(want.shape)}"
    got, want = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    error, scale = (got - want).norm().item(), want.norm().item()
    if not math.isfinite(error):
        return math.inf
    return error / scale if scale > 0 else (math.inf if error > 0 else 0.0)


def tiny_config(n_kv_heads: int = 1, **changes: object) -> Config:
    """Two layers, five experts, nothing a power of two that need not be."""
    values: dict[str, object] = {
        "name": "tiny",
        "d_model": 24,
        "n_layers": 2,
        "vocab_size": 61,
        "max_seq_len": 40,
        "attention": AttentionConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=10),
        "experts": ExpertsConfig(n_experts=5, top_k=2, d_ff=20),
    }
    return Config(**{**values, **changes})  # type: ignore[arg-type]


def tokens(B: int = 3, S: int = 16, V: int = 61, seed: int = 0) -> Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.fixture
def tiny() -> Config:
    return tiny_config()


def run_cli(*arguments: object) -> object:
    """Runs `moe` with these arguments; returns its exit status."""

    from moe.cli import main

    with pytest.raises(SystemExit) as exit_:
        main.main([str(a) for a in arguments])
    return exit_.value.code


def start_cli(*arguments: object) -> subprocess.Popen[str]:
    """Starts `moe` with these arguments in a process of its own, on one thread; its output is in one pipe."""
    command = [sys.executable, "-m", "moe", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def any_moment() -> random.Random:
    """For moments to kill a process at, others in every run. A failure prints the seed; MOE_TEST_SEED=N repeats it."""
    seed = int(os.environ.get("MOE_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"moments to kill at: MOE_TEST_SEED={seed} repeats them")
    return random.Random(seed)


# ------------------------------------------------------------------------------------------- a run of a few seconds

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
