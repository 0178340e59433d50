"""The Triton body of ops.linear_cross_entropy, against the formulas in float64: rows whole and in blocks, chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.kernels.loss import op
from tests.conftest import rel
from tests.kernels.test_loss import by_hand, make

fused = pytest.importorskip("moe.kernels.loss.triton_chunked")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3}  # bfloat16 is wrong in the interpreter; test_gpu.py has it


@pytest.fixture(params=["rows in registers", "rows in blocks"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a row, at vocabularies that the interpreter takes."""
    if request.param == "rows in blocks":
        monkeypatch.setattr(fused, "_REGISTER_ROW", 8)
        monkeypatch.setattr(fused, "block_and_warps", lambda V: (16, 4))


def run(x: Tensor, w: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x, w = (t.detach().to(DEVICE).requires_grad_() for t in (x, w))
    total = ops.linear_cross_entropy(x, w, targets.to(DEVICE), "triton")
    dx, dw = torch.autograd.grad(total * factor, (x, w))
    return total, dx, dw


def check(x: Tensor, w: Tensor, targets: Tensor, tolerance: float) -> None:
    got, want = run(x, w, targets), by_hand(x, w, targets)
    for name, a, b in zip(("loss", "dx", "dw"), got, want, strict=True):
        assert rel(a, b) < tolerance, f"{name}: {rel(a, b):.1e}"


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("tokens_per_chunk", [1, 5, 17, 4096])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_chunk_size(monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(fused, "CHUNK_TOKENS", tokens_per_chunk)
    x, w, targets = make(V=43)
    x, w = x.to(dtype), w.to(dtype)
    total, dx, dw = run(x, w, targets)
    assert [t.dtype for t in (total, dx, dw)] == [torch.float32, dtype, dtype]
    check(x, w, targets, TOLERANCE[dtype])


@pytest.mark.usefixtures("rows")
@given(T=st.integers(0, 12), V=st.integers(1, 70), D=st.integers(1, 9), ignored=st.sampled_from([0, 0.5, 1.0]))
@settings(max_examples=15)
def test_any_shape(T: int, V: int, D: int, ignored: float) -> None:
    x, w, targets = make(T, V, D, ignored, seed=T + V)
    got, want = run(x.float(), w.float(), targets), by_hand(x.float(), w.float(), targets)
    for a, b in zip(got, want, strict=True):  # with a vocabulary of one, all are zeros but for rounding
        assert (a.cpu().double() - b).norm() <= 4e-6 * b.norm() + 1e-6, (a, b)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits_neither_overflow_nor_underflow(dtype: torch.dtype) -> None:
    x = torch.tensor([[1000.0], [-1000.0]], dtype=dtype)
    w = torch.tensor([[1.0], [0.0], [-1.0]], dtype=dtype)
    total, dx, dw = run(x, w, torch.tensor([0, 0]))
    assert total.item() == 2000.0
    assert dx.tolist() == [[0.0], [-2.0]]
    assert dw.tolist() == [[1000.0], [0.0], [-1000.0]]


@pytest.mark.usefixtures("rows")
def test_padding_and_ignored_rows_are_never_seen() -> None:
    """What a chunk's memory held before changes nothing: here NaN (conftest.py)."""
    x, w, targets = (t.to(DEVICE) for t in make(V=21))
    total = torch.zeros(len(x), device=DEVICE)
    logits = x.new_empty(17, 32, dtype=torch.float32)
    logits[:, :21] = x @ w.t()
    logits[targets == -100] = math.nan
    fused.losses_and_dlogits(logits[:, :21], targets, total, True)
    want = ((x @ w.t()).softmax(1) - torch.nn.functional.one_hot(targets.clamp(min=0), 21)) * (targets != -100)[:, None]
    assert rel(logits[:, :21], want) < 1e-6
    assert rel(total.sum(), by_hand(*(t.cpu() for t in (x, w, targets)))[0]) < 1e-6


@pytest.mark.usefixtures("rows")
def test_a_target_outside_the_vocabulary_makes_the_loss_nan() -> None:
    x, w, targets = make(ignored=0)
    for wrong in (23, -1, 2**40):
        targets[3] = wrong
        assert run(x.float(), w.float(), targets)[0].isnan()


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_upstream_gradient_scales(factor: float) -> None:
    x, w, targets = make()
    _, dx, dw = run(x.float(), w.float(), targets, factor)
    _, want_dx, want_dw = by_hand(x, w, targets)
    assert rel(dx, want_dx * factor) < 2e-6
    assert rel(dw, want_dw * factor) < 2e-6


def test_weights_in_another_dtype_and_strides_that_are_not_the_usual() -> None:
    x, w, targets = make()
    x, w = x.half().t().contiguous().t(), w.float().t().contiguous().t()
    total, dx, dw = run(x, w, torch.stack([targets, targets * 0], 1)[:, 0])
    assert (dx.dtype, dw.dtype) == (torch.float16, torch.float32)
    for a, b in zip((total, dx, dw), by_hand(x, w, targets), strict=True):
        assert rel(a, b) < 4e-3


def test_autocast() -> None:
    x, w, targets = make()
    with torch.autocast(DEVICE, torch.float16):
        got = run(x.float(), w.float(), targets)
    assert all(t.dtype == torch.float32 for t in got)
    for a, b in zip(got, by_hand(x, w, targets), strict=True):
        assert rel(a, b) < 4e-3


def test_without_gradients_the_logits_stay_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "accumulate", None)
    x, w, targets = (t.to(DEVICE) for t in make())
    with torch.no_grad():
        total = ops.linear_cross_entropy(x.float().requires_grad_(), w.float(), targets, "triton")
    assert not total.requires_grad
    assert rel(total, by_hand(*make())[0]) < 1e-6


@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck(want_grad: bool) -> None:
    x, w, targets = (t.to(DEVICE) for t in make(T=5, V=7, D=3))
    leaves = (t.float().requires_grad_(want_grad) for t in (x, w))
    torch.library.opcheck(op._linear_cross_entropy, (*leaves, targets, want_grad, "triton"))


def test_checkpointed_compiled_and_twice_give_the_same_bits() -> None:
    x, w, targets = (t.to(DEVICE) for t in make())
    x, w = x.float().requires_grad_(), w.float().requires_grad_()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, targets, "triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    totals = [loss(x, w), loss(x, w), checkpoint(loss, x, w, use_reentrant=False), compiled(x, w)]
    first, *others = [(total, *torch.autograd.grad(total, (x, w))) for total in totals]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_chunks_are_even_and_bounded() -> None:
    assert [fused.chunk_tokens(T) for T in (0, 1, 100, 4096, 4097, 8192, 9000)] == [1, 1, 100, 4096, 2176, 4096, 3072]
    for T in range(1, 40_000, 371):
        chunk = fused.chunk_tokens(T)
        assert chunk <= 4096
        assert -(-T // chunk) == -(-T // 4096), "no more chunks than there must be"
