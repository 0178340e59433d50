"""How kernels are launched: on which device, with which arithmetic. Kernels are stood in for by recorders here."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.kernels import ops
from moe.kernels.arguments import on_device_of
from moe.kernels.attention import op as attention_op
from moe.kernels.experts import inference, op
from moe.kernels.gate import op as gate_op
from moe.kernels.loss import op as loss_op

pytest.importorskip("triton")
from moe.kernels.ahead import MODULES
from moe.kernels.experts import triton_tma


class Recorder:
    """Stands before a kernel, or in its place: keeps of every launch its name, its arguments and the current device."""

    def __init__(self, name: str, kernel: Any, seen: list[tuple[str, dict[str, Any], int]], runs: bool) -> None:
        self.name, self.kernel, self.seen, self.runs = name, kernel, seen, runs

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.seen.append((self.name, kwargs, torch.cuda.current_device() if not self.runs else -1))
            if self.runs:
                self.kernel[grid](*args, **kwargs)

        return launch


def record(monkeypatch: pytest.MonkeyPatch, runs: bool) -> list[tuple[str, dict[str, Any], int]]:
    seen: list[tuple[str, dict[str, Any], int]] = []
    for module in MODULES:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(name, kernel, seen, runs))
    return seen


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CUDA devices that are not there; the current one is the list's only number."""
    current = [0]

    def exchange(index: int) -> int:
        before = current[0]
        if index >= 0:
            current[0] = index
        return before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current


def of(device: str) -> Any:
    """All of a tensor that the guard looks at: there are no tensors of such devices here."""
    return SimpleNamespace(device=torch.device(device))


def test_the_guard(devices: list[int]) -> None:
    for device, inside in (("cuda:1", 1), ("cuda:0", 0), ("cpu", 0), ("meta", 0)):
        with on_device_of(of(device)):
            assert devices == [inside]
        assert devices == [0]


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_every_kernel_is_launched_under_the_guard(
    tma: bool, biases: bool, devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_tma, "fits", lambda x, experts: tma)
    monkeypatch.setattr(triton_tma, "_box", lambda *_: None)
    monkeypatch.setattr(triton_tma, "create_ragged_descriptor", lambda *_: None)
    for module in (op, inference, attention_op, gate_op, loss_op):
        monkeypatch.setattr(module, "on_device_of", lambda x: on_device_of(of("cuda:1")))
    seen = record(monkeypatch, runs=False)
    E, K, D, width = 4, 2, 32, 64

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for T in (3, 1000):
        x, w_in, w_out = empty(T, D), empty(E, 2, width, D), empty(E, D, width)
        weights, ids = empty(T, K, dtype=torch.float32), empty(T, K, dtype=torch.int64)
        b_in, b_out = (empty(E, 2, width), empty(E, D)) if biases else (None, None)
        inputs = (x, w_in, w_out, weights, ids)
        _, h, order, offsets = op._forward(*inputs, b_in, b_out, "swiglu", "triton", False, None)
        op._expert_mlp_backward._init_fn(x, *inputs, h, order, offsets, b_in, b_out, "swiglu", "triton", None)
        logits = empty(T, E, dtype=torch.float32)
        gate_op._topk_gate._init_fn(logits, None, None, K)
        gate_op._topk_gate_backward._init_fn(weights, weights, ids, E)
        loss_op._linear_cross_entropy._init_fn(x, empty(100, D), ids[:, 0], True, "triton")
        inference.forward(x, w_in, None, w_out, None, weights, ids, "swiglu", "triton", False)
        heads, blocks = empty(T, 4, 16), empty(T, 2, dtype=torch.int32)
        starts, lengths = (empty(n, dtype=torch.int32) for n in (T + 1, T))
        attention_op._forward(heads, heads, heads, blocks, starts, lengths, 1, 1, 2, None, None, "triton")
    assert devices == [0]  # as it was
    assert {device for _, _, device in seen} == {1}
    names = {name for name, _, _ in seen}
    products = {"up_kernel", "down_kernel", "down_backward_kernel", "weight_gradient_kernel"}
    routing = {"_route_kernel", "_count_kernel", "_scan_kernel", "_place_kernel", "_tile_kernel"}
    others = {"combine_kernel", "_gate_kernel", "_gate_backward_kernel", "loss_kernel"}
    decoding = {"parts_kernel", "activate_kernel", "combine_parts_kernel", "split_kernel", "merge_kernel"}
    assert names == products | routing | others | decoding | ({"gather_kernel"} if tma else set()) | (
        {"bias_gradient_kernel"} if biases else set()
    )


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.fixture
def _torch_as_it_was() -> Iterator[None]:
    backends: Any = torch.backends
    before = backends.fp32_precision, backends.cuda.matmul.fp32_precision
    old = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(old)
    backends.fp32_precision, backends.cuda.matmul.fp32_precision = before


def step(precision: str | None) -> None:
    g = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(s, generator=g).requires_grad_() for s in ((5, 16), (3, 2, 24, 16), (3, 16, 24)))
    weights, ids = torch.rand(5, 2, generator=g), torch.randint(3, (5, 2), generator=g)
    ops.expert_mlp(x, w_in, w_out, weights, ids, "swiglu", "triton", precision=precision).sum().backward()


def old_interface(value: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value == "tf32"


def new_interface(value: str) -> None:
    backends: Any = torch.backends
    backends.fp32_precision = value


def new_interface_of_products(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def as_torch_is_set(value: str) -> None:
    torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")


@pytest.mark.usefixtures("_torch_as_it_was")
@pytest.mark.parametrize("setting", ["ieee", "tf32"])
@pytest.mark.parametrize("interface", [old_interface, new_interface, new_interface_of_products, as_torch_is_set])
def test_float32_products_are_as_torch_is_set(interface: Any, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interface(setting)
    seen = record(monkeypatch, runs=True)
    step(None)
    passed = [kwargs["PRECISION"] for _, kwargs, _ in seen if "PRECISION" in kwargs]
    assert passed == [setting] * 6  # up, down, its backward, two weights' gradients, dx


@pytest.mark.parametrize("precision", op.PRECISIONS)
def test_float32_products_are_as_the_call_says(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record(monkeypatch, runs=True)
    step(precision)
    assert [kwargs["PRECISION"] for _, kwargs, _ in seen if "PRECISION" in kwargs] == [precision] * 6


def test_a_precision_that_does_not_exist_or_is_not_triton_s() -> None:
    with pytest.raises(ValueError, match=r"precision = 'bf16': must be None or.*one of ieee, tf32, tf32x3"):
        step("bf16")
    x, weights, ids = torch.randn(3, 8), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"precision = 'tf32'.*here it is reference"):
        ops.expert_mlp(
            x, torch.randn(2, 1, 8, 8), torch.randn(2, 8, 8), weights, ids, "gelu", "reference", precision="tf32"
        )


def test_nothing_is_kept_where_there_is_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record(monkeypatch, runs=True)
    with torch.no_grad():
        x, weights, ids = torch.randn(3, 8), torch.rand(3, 1), torch.zeros(3, 1, dtype=torch.int64)
        ops.expert_mlp(x, torch.randn(2, 1, 8, 8), torch.randn(2, 8, 8), weights, ids, "gelu", "triton")
    assert [kwargs["STORE_H"] for name, kwargs, _ in seen if name == "up_kernel"] == [False]
