"""ops.linear_cross_entropy: loss and gradients against -log softmax written out in float64, chunk by chunk or not."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.kernels.loss import chunked, op, reference
from tests.conftest import rel

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}
CHUNKS = [1, 3, 7, 16, 17, 18, 1000]  # tokens per chunk; there are 17


def make(T: int = 17, V: int = 23, D: int = 12, ignored: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(T, D, generator=g, dtype=torch.float64)
    w = torch.randn(V, D, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (T,), generator=g)
    return x, w, targets.masked_fill(torch.rand(T, generator=g) < ignored, -100)


def by_hand(x: Tensor, w: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and its gradients from the formulas: d/dlogits = softmax - one_hot, token by token in float64."""
    x, w = x.detach().double(), w.detach().double()
    total, dx, dw = torch.zeros((), dtype=torch.float64), torch.zeros_like(x), torch.zeros_like(w)
    for t, target in enumerate(targets.tolist()):
        if target == -100:
            continue
        logits = w @ x[t]
        total += logits.logsumexp(0) - logits[target]
        dlogits = logits.softmax(0)
        dlogits[target] -= 1
        dx[t], dw = dlogits @ w, dw + torch.outer(dlogits, x[t])
    return total, dx, dw


def run(x: Tensor, w: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    total = ops.linear_cross_entropy(x, w, targets)
    dx, dw = torch.autograd.grad(total * factor, (x, w))
    return total, dx, dw


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(("loss", "dx", "dw"), got, want, strict=True):
        assert rel(a, b) < tolerance, f"{name}: {rel(a, b):.2e}"


@pytest.mark.parametrize("tokens_per_chunk", CHUNKS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_chunk_size(monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", tokens_per_chunk * 23)
    x, w, targets = make()
    x, w = x.to(dtype), w.to(dtype)
    got = run(x, w, targets)
    assert [t.dtype for t in got] == [torch.promote_types(dtype, torch.float32), dtype, dtype]
    assert_close(got, by_hand(x, w, targets), TOLERANCE[dtype])


def test_a_chunk_smaller_than_one_row_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 5)
    assert_close(run(*make()), by_hand(*make()), 1e-13)


@given(T=st.integers(0, 20), V=st.integers(1, 30), D=st.integers(1, 9), ignored=st.sampled_from([0, 0.5, 1.0]))
def test_any_shape(T: int, V: int, D: int, ignored: float) -> None:
    x, w, targets = make(T, V, D, ignored, seed=T + V)
    want = by_hand(x, w, targets)
    assert rel(reference.linear_cross_entropy(x, w, targets), want[0]) < 1e-12
    got = run(x, w, targets)
    if V == 1:  # log softmax of the only token is 0
        assert all(t.abs().max() < 1e-12 for t in got if t.numel())
    else:
        assert_close(got, want, 1e-12)


def test_all_targets_ignored() -> None:
    x, w, _ = make()
    for t in run(x, w, torch.full((17,), -100)):
        assert torch.equal(t, torch.zeros_like(t))


def test_ignored_tokens_change_nothing() -> None:
    x, w, targets = make()
    keep = targets != -100
    everything, kept = run(x, w, targets), run(x[keep], w, targets[keep])
    assert rel(everything[0], kept[0]) < 1e-14
    assert rel(everything[1][keep], kept[1]) < 1e-14
    assert (everything[1][~keep] == 0).all()
    assert rel(everything[2], kept[2]) < 1e-14


def test_large_logits_neither_overflow_nor_underflow() -> None:
    x = torch.tensor([[1000.0], [-1000.0]])
    w = torch.tensor([[1.0], [0.0], [-1.0]])
    total, dx, dw = run(x, w, torch.tensor([0, 0]))
    # The first token is certain and right; the second is certain of the last entry and wrong by 2000 nats.
    assert total.item() == 2000.0
    assert dx.tolist() == [[0.0], [-2.0]]
    assert dw.tolist() == [[1000.0], [0.0], [-1000.0]]


def test_uniform_logits_give_log_v() -> None:
    total, _, _ = run(torch.zeros(5, 4), torch.randn(23, 4), torch.arange(5))
    assert total.item() == pytest.approx(5 * math.log(23), rel=1e-6)


@pytest.mark.parametrize("factor", [0.25, -3.0])
def test_upstream_gradient_scales(factor: float) -> None:
    total, dx, dw = by_hand(*make())
    assert_close(run(*make(), factor=factor), (total, dx * factor, dw * factor), 1e-13)


def test_autocast() -> None:
    x, w, targets = make()
    x, w = x.float(), w.float()
    with torch.autocast("cpu", torch.bfloat16):
        got = run(x, w, targets)
    assert all(t.dtype == torch.float32 for t in got)
    assert_close(got, by_hand(x, w, targets), 2e-2)


def test_only_one_input_wants_a_gradient() -> None:
    x, w, targets = make()
    _, dx, dw = by_hand(x, w, targets)
    x_leaf, w_leaf = x.clone().requires_grad_(), w.clone().requires_grad_()
    assert rel(torch.autograd.grad(ops.linear_cross_entropy(x_leaf, w, targets), x_leaf)[0], dx) < 1e-13
    assert rel(torch.autograd.grad(ops.linear_cross_entropy(x, w_leaf, targets), w_leaf)[0], dw) < 1e-13


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> None:
        raise AssertionError("the gradient of w was computed")

    monkeypatch.setattr(chunked, "accumulate", refuse)
    x, w, targets = make()
    with torch.no_grad():
        total = ops.linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), targets)
    assert not total.requires_grad
    assert rel(total, by_hand(x, w, targets)[0]) < 1e-13


def test_non_contiguous_inputs() -> None:
    x, w, targets = make()
    x, w = (t.t().contiguous().t() for t in (x, w))
    x_leaf, w_leaf = x.requires_grad_(), w.requires_grad_()
    spread = torch.stack([targets, targets * 0], 1)[:, 0]
    total = ops.linear_cross_entropy(x_leaf, w_leaf, spread)
    assert_close((total, *torch.autograd.grad(total, (x_leaf, w_leaf))), by_hand(x, w, targets), 1e-13)


def test_gradcheck() -> None:
    x, w, targets = make(T=5, V=7, D=3)
    assert torch.autograd.gradcheck(
        lambda a, b: ops.linear_cross_entropy(a, b, targets), (x.requires_grad_(), w.requires_grad_())
    )


@pytest.mark.parametrize("want_grad", [False, True])
def test_opcheck(want_grad: bool) -> None:
    x, w, targets = make(T=5, V=7, D=3)
    torch.library.opcheck(
        op._linear_cross_entropy,
        (x.float().requires_grad_(want_grad), w.float().requires_grad_(want_grad), targets, want_grad, "torch"),
    )


def test_activation_checkpointing_and_twice_give_the_same_bits() -> None:
    x, w, targets = make()
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    plain = [ops.linear_cross_entropy(x, w, targets) for _ in range(2)]
    again = checkpoint(ops.linear_cross_entropy, x, w, targets, use_reentrant=False)
    first, *others = [(total, *torch.autograd.grad(total, (x, w))) for total in (*plain, again)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_compiles_in_one_graph() -> None:
    x, w, targets = make()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x: Tensor, w: Tensor) -> Tensor:
        return ops.linear_cross_entropy(x, w, targets) / 2

    leaves = x.requires_grad_(), w.requires_grad_()
    total = compiled(*leaves)
    want = [t / 2 for t in by_hand(x, w, targets)]
    assert_close((total, *torch.autograd.grad(total, leaves)), tuple(want), 1e-13)


def test_a_gradient_in_bfloat16_is_summed_over_chunks_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 equal shares of a sum: in bfloat16, adding one would stop to change it long before."""
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2)
    x, w = torch.ones(600, 1), torch.zeros(2, 1)
    _, _, dw = run(x.bfloat16(), w.bfloat16(), torch.zeros(600, dtype=torch.int64))
    assert dw.tolist() == [[-300.0], [300.0]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"x_TD": torch.zeros(2, 3, 4)}, r"got \[2, 3, 4\], \[7, 4\], \[3\]"),
        ({"w_VD": torch.zeros(7, 5)}, r"got \[3, 4\], \[7, 5\], \[3\]"),
        ({"targets_T": torch.zeros(2, dtype=torch.int64)}, r"got \[3, 4\], \[7, 4\], \[2\]"),
        ({"targets_T": torch.zeros(3, dtype=torch.int32)}, "targets must be int64; got torch.int32"),
        ({"impl": "grouped"}, """impl = 'grouped': must be "torch" or "triton", or None"""),
        ({"x_TD": torch.zeros(3, 4).double(), "impl": "triton"}, 'not torch.float64; use "torch"'),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, complaint: str) -> None:
    given = {"x_TD": torch.zeros(3, 4), "w_VD": torch.zeros(7, 4), "targets_T": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=complaint):
        ops.linear_cross_entropy(**{**given, **change})


def test_the_gradient_of_w_is_summed_in_at_least_float32_unless_there_is_one_chunk_of_its_dtype() -> None:
    bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    for w_dtype, dtype, chunks, want in (
        (bf16, bf16, 1, bf16),
        (bf16, bf16, 2, fp32),
        (fp32, bf16, 1, fp32),
        (fp16, fp32, 1, fp32),
        (fp32, fp32, 3, fp32),
        (fp64, fp64, 2, fp64),
    ):
        found = chunked.accumulator(torch.ones(2, 3, dtype=w_dtype), dtype, chunks)
        assert (found.dtype, found.shape, found.abs().sum()) == (want, (2, 3), 0)
