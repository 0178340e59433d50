"""Memory of training on one device against what training really takes, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe.errors import ConfigError
from moe.plan.device import device_memory, device_step_time, device_step_work
from moe.plan.hardware import load_hardware

ROOT = Path(__file__).parents[2]

# Two optimizer steps as moe.train makes them; peak resident memory beside what the process had before the model.
MEASURE = """
import json, sys
import torch
from moe.config import load_config
from moe.model import Transformer
from moe.device import tune_cpu
from moe.train.optimizer import build
from moe.train.predicted import memory_in_use, memory_peak

name, micro_batch, seq_len, tuned, *changes = sys.argv[1:]
micro_batch, seq_len = int(micro_batch), int(seq_len)
torch.set_num_threads(1)
if tuned == "tuned":
    tune_cpu()

def step(model, optimizers, cfg, micro_batch, seq_len):
    n = cfg.train.batch_size // micro_batch
    for _ in range(n):
        tokens = torch.randint(model.cfg.vocab_size, (micro_batch, seq_len + 1))
        (model(tokens[:, :-1], tokens[:, 1:]).loss / n).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizers.step()
    optimizers.zero_grad()

cfg = load_config(name).with_overrides(changes)
tiny = Transformer(cfg.scaled(d_model=192, n_layers=1, vocab_size=64))
step(tiny, build(tiny, cfg.train), cfg, cfg.train.batch_size, 8)
del tiny
before = memory_in_use(torch.device("cpu"))
model = Transformer(cfg, 0)
model.activation_checkpointing = cfg.train.activation_checkpointing
optimizers = build(model, cfg.train)
for _ in range(2):
    step(model, optimizers, cfg, micro_batch, seq_len)
print(json.dumps([before, memory_peak(torch.device("cpu"))]))
"""


def measure(name: str, micro_batch: int, seq_len: int, heap: str, *changes: str) -> tuple[int, int]:
    """Resident bytes before the model and at the peak. "mapped": each large tensor is given back when it is freed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])}
    if heap == "mapped":
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, name, str(micro_batch), str(seq_len), heap, *changes]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    return before, peak


CASES = [
    ("replica-nano", 16, 128),
    pytest.param(("replica-nano", 16, 256), marks=pytest.mark.slow),
    pytest.param(("replica-nano", 4, 256), marks=pytest.mark.slow),
    pytest.param(("replica-nano", 16, 256, "train.activation_checkpointing=full"), marks=pytest.mark.slow),
    pytest.param(("replica-nano", 16, 256, "train.activation_checkpointing=selective"), marks=pytest.mark.slow),
    pytest.param(("replica-small", 4, 128, "train.batch_size=4"), marks=pytest.mark.slow),
]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_tensors_of_training_are_those_predicted(case: tuple) -> None:
    name, micro_batch, seq_len, *changes = case
    before, peak = measure(name, micro_batch, seq_len, "mapped", *changes)
    from moe.config import load_config

    cfg = load_config(name).with_overrides(changes)
    predicted = device_memory(cfg, micro_batch=micro_batch, seq_len=seq_len)["device.peak"].to("B")
    assert predicted == pytest.approx(peak - before, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_of_the_demo_as_moe_train_runs_it() -> None:
    """The heap that training keeps for reuse is fragmented, so that the process is larger than its tensors."""
    before, peak = measure("replica-nano", 16, 256, "tuned")
    assert before + device_memory("replica-nano")["device.peak"].to("B") == pytest.approx(peak, rel=0.15)


def test_what_is_held_by_hand() -> None:
    sheet = device_memory("replica-nano", micro_batch=2, seq_len=10)
    n = 22_722_240
    assert sheet["device.weights"].to("B") == 4 * n
    assert sheet["device.gradients"].to("B") == 4 * n
    blocks = 4 * (2 * 192 * (384 + 64) + 16 * 3 * 192 * 512)
    assert sheet["device.optimizer"].to("B") == 8 * (n - blocks) + 4 * blocks
    adamw = device_memory("replica-nano", optimizer="adamw")
    assert adamw["device.optimizer"].to("B") == 8 * n
    assert device_memory("replica-nano", dtype="bf16")["device.copies"].to("B") == 2 * blocks


def saved_by_blocks(cfg: Any, tokens: int) -> int:
    """Bytes that a forward pass keeps for its backward, but for the parameters."""
    import torch

    from moe.model import Transformer

    model, kept = Transformer(cfg), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    ids = torch.randint(cfg.vocab_size, (1, tokens + 1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids[:, :-1], ids[:, 1:])
    return sum(kept.values())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_dense_layer_takes_its_own_memory(activation: str) -> None:
    """What torch keeps with one dense layer over what it keeps without; and parameters, by hand."""
    from moe.config import load_config

    plain = load_config("replica-tiny").with_overrides([f"experts.activation={activation}", "train.optimizer=muon"])
    dense = plain.with_overrides(["dense.layers=1", "dense.d_ff=1500"])
    more = saved_by_blocks(dense, 64) - saved_by_blocks(plain, 64)
    one, other = (device_memory(cfg, micro_batch=1, seq_len=64) for cfg in (plain, dense))
    predicted = other["device.activations"].to("B") - one["device.activations"].to("B")
    assert predicted == pytest.approx(more, rel=0.02)
    matrices = (3 if activation == "swiglu" else 2) * 192
    routed = 16 * matrices * 512 + 192 * 16  # of the layer that is dense now, its router too
    n = sum(p.numel() for p in parameters(dense))
    assert other["device.weights"].to("B") == 4 * n
    # Muon keeps one moment of every block's matrices, AdamW two of the rest: embedding, head, norms, a router.
    rest = 2 * 512 * 192 + 5 * 192 + 192 * 16
    assert other["device.optimizer"].to("B") == 8 * rest + 4 * (n - rest)
    assert n == sum(p.numel() for p in parameters(plain)) - routed + matrices * 1500
    bf16 = device_memory(dense, micro_batch=1, seq_len=64, dtype="bf16")
    assert bf16["device.copies"].to("B") == 2 * (n - rest)
    step, adamw = device_step_work(dense), device_step_work(dense.with_overrides(["train.optimizer=adamw"]))
    assert adamw["step.bytes"].to("B") - step["step.bytes"].to("B") == 8 * (n - rest)  # a moment less, in and out


def parameters(cfg: Any) -> Any:
    import torch

    from moe.model import Transformer

    with torch.device("meta"):
        return list(Transformer(cfg).parameters())


def test_memory_grows_with_what_it_should() -> None:
    peaks = [device_memory("replica-small", micro_batch=b)["device.peak"].value for b in (1, 2, 4, 8, 16)]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]
    for batch in (4, 32):
        kept, again = (
            device_memory("replica-1b", micro_batch=batch, activation_checkpointing=c) for c in ("none", "full")
        )
        assert again["device.activations"] < kept["device.activations"]
        assert again["device.peak"] < kept["device.peak"]


def test_bad_input() -> None:
    for arguments in ({"micro_batch": 0}, {"seq_len": -1}, {"dtype": "fp8"}):
        with pytest.raises(ConfigError, match=next(iter(arguments))):
            device_memory("replica-nano", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"efficiency = 1\.5"):
        device_step_time("replica-nano", load_hardware("cpu"), 1.5)
