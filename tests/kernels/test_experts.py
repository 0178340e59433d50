"""ops.expert_mlp: every implementation, output and all gradients, against float64 autograd of the definition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.kernels.experts import grouped, reference
from moe.kernels.experts import op as op_module
from tests.conftest import rel

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 1.5e-2, torch.bfloat16: 2e-2}
ROUTINGS = [(1, 1), (7, 1), (7, 3), (7, 7), (16, 1), (16, 2), (16, 16)]  # experts, top-k


class Inputs(NamedTuple):
    x: Tensor
    w_in: Tensor
    w_out: Tensor
    weights: Tensor
    ids: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Floating-point parts in `dtype`, except the routing weights, which stay at least float32."""
        x, w_in, w_out = (t.to(dtype) for t in (self.x, self.w_in, self.w_out))
        return Inputs(x, w_in, w_out, self.weights.to(torch.promote_types(dtype, torch.float32)), self.ids)

    def leaves(self) -> "Inputs":
        """Detached copies that want gradients."""
        x, w_in, w_out, weights = (t.detach().clone().requires_grad_() for t in self[:4])
        return Inputs(x, w_in, w_out, weights, self.ids)


def make(
    T: int, E: int, K: int, D: int = 24, width: int = 32, activation: str = "swiglu", seed: int = 0, used: int = 0
) -> Inputs:
    """Random float64 inputs; each token has K different experts, all among the first `used` (0: all) ones."""
    g = torch.Generator().manual_seed(seed)
    gates = ops.ACTIVATIONS[activation]
    ids = torch.rand(T, used or E, generator=g).argsort(1)[:, :K]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    w_in, w_out = normal(E, gates, width, D) / D**0.5, normal(E, D, width) / width**0.5
    return Inputs(normal(T, D), w_in, w_out, normal(T, K).softmax(-1), ids)


def upstream(inputs: Inputs) -> Tensor:
    return torch.randn(inputs.x.shape, generator=torch.Generator().manual_seed(99), dtype=torch.float64)


Run = Callable[[Inputs, Tensor, str], tuple[Tensor, ...]]  # -> y and the gradients of x, w_in, w_out, weights


def by_autograd(inputs: Inputs, dy: Tensor, activation: str) -> tuple[Tensor, ...]:
    """The definition, token by token and slot by slot, in float64: what everything here is held against."""
    x, w_in, w_out, weights, ids = inputs.to(torch.float64).leaves()
    gate_up, down = [w.unbind() for w in w_in.unbind()], w_out.unbind()
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            e = int(ids[t, k])
            if activation == "swiglu":
                a = F.silu(gate_up[e][0] @ x[t]) * (gate_up[e][1] @ x[t])
            else:
                a = F.gelu(gate_up[e][0] @ x[t], approximate="tanh")
            y = y + weights[t, k] * (down[e] @ a)
        rows.append(y)
    y = torch.stack(rows) if rows else x * 0
    total = (y * dy).sum() + sum(p.sum() * 0 for p in (x, w_in, w_out, weights))
    return y, *torch.autograd.grad(total, (x, w_in, w_out, weights))


def op(impl: str | None) -> Run:
    def run(inputs: Inputs, dy: Tensor, activation: str) -> tuple[Tensor, ...]:
        leaves = inputs.leaves()
        y = ops.expert_mlp(*leaves, activation, impl)
        return y, *torch.autograd.grad(y, leaves[:4], dy.to(y.dtype))

    return run


IMPLEMENTATIONS = ["reference", "grouped", "triton"]
WIDEST = {"reference": torch.float64, "grouped": torch.float32, "triton": torch.float32}
RUNS: dict[str, tuple[Run, torch.dtype]] = {
    "reference-fp64": (op("reference"), torch.float64),
    "reference-fp32": (op("reference"), torch.float32),
    "reference-bf16": (op("reference"), torch.bfloat16),
    "reference-fp16": (op("reference"), torch.float16),
    "grouped-fp32": (op("grouped"), torch.float32),
    "grouped-bf16": (op("grouped"), torch.bfloat16),
    # In the interpreter bfloat16 is wrong; it is tested on GPUs.
    "triton-fp32": (op("triton"), torch.float32),
    "triton-fp16": (op("triton"), torch.float16),
}


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], tolerance: float) -> None:
    for name, a, b in zip(("y", "dx", "dw_in", "dw_out", "dweights"), got, want, strict=True):
        assert rel(a, b) < tolerance, f"{name}: {rel(a, b):.2e}"


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("T", [0, 1, 17])
def test_output_and_every_gradient(name: str, activation: str, T: int) -> None:
    run, dtype = RUNS[name]
    # The interpreter takes seconds for a case; test_fused.py has the shapes that matter to it.
    for E, K in ROUTINGS if not name.startswith("triton") else ROUTINGS[2::3]:
        inputs = make(T, E, K, activation=activation).to(dtype)
        got = run(inputs, upstream(inputs), activation)
        assert [t.dtype for t in got] == [dtype, *(t.dtype for t in inputs[:4])]
        assert_close(got, by_autograd(inputs, upstream(inputs), activation), TOLERANCE[dtype])


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("used", [1, 3], ids=["one expert takes all", "most are empty"])
def test_uneven_loads(name: str, used: int) -> None:
    run, dtype = RUNS[name]
    inputs = make(T=50, E=16, K=1, used=used).to(dtype)
    got = run(inputs, upstream(inputs), "swiglu")
    assert_close(got, by_autograd(inputs, upstream(inputs), "swiglu"), TOLERANCE[dtype])
    for dw in got[2:4]:
        assert torch.equal(dw[used:], torch.zeros_like(dw[used:])), "an expert without tokens has a zero gradient"
        assert all(dw[e].norm() > 0 for e in range(used))


@pytest.mark.parametrize("name", [n for n in RUNS if not n.startswith("grouped")])
def test_many_tokens_and_odd_widths(name: str) -> None:
    run, dtype = RUNS[name]
    inputs = make(T=200 if not name.startswith("triton") else 60, E=7, K=3, D=37, width=51).to(dtype)
    assert_close(
        run(inputs, upstream(inputs), "swiglu"), by_autograd(inputs, upstream(inputs), "swiglu"), TOLERANCE[dtype]
    )


@given(
    T=st.integers(0, 30),
    E=st.integers(1, 9),
    D=st.integers(1, 12),
    width=st.integers(1, 12),
    activation=st.sampled_from(["swiglu", "gelu"]),
    impl=st.sampled_from(["reference", "grouped", None]),
    data=st.data(),
)
def test_any_shape(T: int, E: int, D: int, width: int, activation: str, impl: str | None, data: st.DataObject) -> None:
    K = data.draw(st.integers(1, E), "K")
    wide = 4 if impl == "grouped" else 1  # its rows are multiples of 16 bytes
    inputs = make(T, E, K, D * wide, width * wide, activation, seed=data.draw(st.integers(0, 99)))
    if data.draw(st.booleans(), "an expert may be chosen twice"):
        inputs = inputs._replace(ids=torch.randint(E, (T, K), generator=torch.Generator().manual_seed(T)))
    if impl == "grouped":
        inputs = inputs.to(torch.float32)
    got = op(impl)(inputs, upstream(inputs), activation)
    tolerance = 1e-12 if impl != "grouped" else TOLERANCE[torch.float32]
    assert_close(got, by_autograd(inputs, upstream(inputs), activation), tolerance)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_reference_itself(activation: str) -> None:
    """reference.expert_mlp under autograd, and its written-out backward, against the definition."""
    inputs = make(T=40, E=7, K=3, activation=activation)
    dy, leaves = upstream(inputs), inputs.leaves()
    want = by_autograd(inputs, dy, activation)
    y = reference.expert_mlp(*leaves, activation)
    assert_close((y, *torch.autograd.grad(y, leaves[:4], dy)), want, 1e-13)
    assert_close((y, *reference.expert_mlp_backward(dy, *inputs, activation)[:4]), want, 1e-13)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_gradcheck(activation: str) -> None:
    inputs = make(T=5, E=4, K=2, D=3, width=4, activation=activation).leaves()

    def call(x: Tensor, w_in: Tensor, w_out: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_mlp(x, w_in, w_out, weights, inputs.ids, activation, "reference")

    assert torch.autograd.gradcheck(call, inputs[:4])


# --------------------------------------------------------------------------------------------- layouts and contexts


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another memory layout."""
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "an element into its memory":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t)
    if how == "rows a few bytes apart":
        return torch.cat([t, t[..., :1]], dim=-1)[..., :-1]
    return torch.stack([t, t * 0], dim=-1)[..., 0]  # "every second element"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "how", ["transposed", "every second element", "rows a few bytes apart", "an element into its memory"]
)
@pytest.mark.parametrize("which", range(5), ids=Inputs._fields)
def test_layouts_of_the_inputs(impl: str, how: str, which: int) -> None:
    inputs = make(T=17, E=7, K=3).to(WIDEST[impl])
    moved = strided(inputs[which], how)
    assert moved.is_contiguous() == (how == "an element into its memory")
    assert torch.equal(moved, inputs[which])
    leaves = inputs.leaves()._replace(**{Inputs._fields[which]: moved.detach().requires_grad_(which < 4)})
    y = ops.expert_mlp(*leaves, "swiglu", impl)
    got = torch.autograd.grad(y, leaves[:4], upstream(inputs).to(y.dtype))
    assert_close((y, *got), by_autograd(inputs, upstream(inputs), "swiglu"), TOLERANCE[WIDEST[impl]])


def test_weights_are_read_where_they_are_if_they_can_be() -> None:
    w = torch.randn(3, 8, 12)
    for how in ("transposed", "every second element", "rows a few bytes apart", "an element into its memory"):
        moved = strided(w, how)
        assert (grouped._operand(moved) is moved) == (how == "transposed")
        assert torch.equal(grouped._operand(moved), w)
    assert grouped._operand(w) is w


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_expanded_gradient(impl: str) -> None:
    inputs = make(T=17, E=7, K=3).to(WIDEST[impl])
    leaves = inputs.leaves()
    y = ops.expert_mlp(*leaves, "swiglu", impl)
    y.sum().backward()  # the gradient arrives as one element with strides of 0
    want = by_autograd(inputs, torch.ones_like(inputs.x), "swiglu")
    assert_close((y, *(t.grad for t in leaves[:4] if t.grad is not None)), want, TOLERANCE[WIDEST[impl]])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways of computing the forward were taken, in turn: grouped.py's functions, or the op."""
    names: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def spy(*arguments: Any) -> Any:
            names.append(name)
            return original(*arguments)

        monkeypatch.setattr(module, name, spy)

    for module, name in ((grouped, "one_token_top2"), (grouped, "forward"), (op_module, "_expert_mlp")):
        watch(module, name)
    return names


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", [[[1, 4]], [[4, 1]], [[0, 1]], [[2]], [[4, 0, 2]], [[1, 4], [4, 0]]], ids=str)
def test_decoding_takes_its_shortcuts(
    ids: list[list[int]], dtype: torch.dtype, activation: str, taken: list[str]
) -> None:
    """A CPU that generates goes past the dispatcher, and for one token with two experts past the sort too."""
    inputs = make(len(ids), 5, len(ids[0]), activation=activation)._replace(ids=torch.tensor(ids)).to(dtype)
    got = ops.expert_mlp_inference(*inputs, activation)
    if len(ids) == 1 and len(ids[0]) == 2:
        assert taken == ["one_token_top2"]
    else:
        assert taken == ["_expert_mlp" if dtype == torch.float64 else "forward"]
    assert got.dtype == dtype
    assert rel(got, by_autograd(inputs, upstream(inputs), activation)[0]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", RUNS)
def test_twice_gives_the_same_bits(name: str) -> None:
    run, dtype = RUNS[name]
    inputs = make(T=30, E=7, K=3).to(dtype)
    first, second = (run(inputs, upstream(inputs), "swiglu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("impl", "narrow"),
    # Not bfloat16 where the interpreter computes: it does so wrongly.
    [("reference", torch.bfloat16), ("grouped", torch.bfloat16), ("triton", torch.float16)],
)
def test_autocast_computes_narrow_and_returns_gradients_in_the_weights_dtype(impl: str, narrow: torch.dtype) -> None:
    inputs = make(T=17, E=7, K=3).to(torch.float32)
    leaves = inputs.leaves()
    with torch.autocast("cpu", narrow):
        y = ops.expert_mlp(*leaves, "swiglu", impl)
    assert y.dtype == narrow
    got = torch.autograd.grad(y, leaves[:4], upstream(inputs).to(y.dtype))
    assert all(g.dtype == torch.float32 for g in got)
    assert_close((y, *got), by_autograd(inputs, upstream(inputs), "swiglu"), 3e-2)
    assert torch.equal(y, ops.expert_mlp(*inputs.to(narrow), "swiglu", impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_activation_checkpointing_gives_the_same_bits(impl: str) -> None:
    inputs, results = make(T=17, E=7, K=3).to(torch.float32), []
    for again in (False, True):
        leaves = inputs.leaves()
        if again:
            y = checkpoint(ops.expert_mlp, *leaves, "swiglu", impl, use_reentrant=False)
        else:
            y = ops.expert_mlp(*leaves, "swiglu", impl)
        results.append((y, *torch.autograd.grad(y, leaves[:4], upstream(inputs).float())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_recomputing_pre_activations_gives_the_same_bits(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, backward = [], grouped.backward

    def spy(*arguments: Any) -> Any:
        seen.append(arguments[5].numel())
        return backward(*arguments)

    monkeypatch.setattr(grouped, "backward", spy)
    inputs, results = make(T=17, E=7, K=3, activation=activation, used=5).to(torch.float32), []
    for recompute in (False, True):
        leaves = inputs.leaves()
        y = ops.expert_mlp(*leaves, activation, "grouped", recompute=recompute)
        results.append((y, *torch.autograd.grad(y, leaves[:4], upstream(inputs).float())))
    assert seen == [17 * 3 * ops.ACTIVATIONS[activation] * 32, 0], "pre-activations that were kept"
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck(impl: str, activation: str, recompute: bool) -> None:
    inputs = make(T=9, E=4, K=2, activation=activation).to(torch.float32)
    torch.library.opcheck(op_module._expert_mlp, (*inputs.leaves(), None, None, activation, impl, recompute))
    saved = op_module._expert_mlp(*inputs, None, None, activation, impl, False)[1:]
    backward = (upstream(inputs).float(), *inputs, *saved, None, None, activation, impl)
    torch.library.opcheck(op_module._expert_mlp_backward, backward, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiles_in_one_graph(impl: str) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(*args: Tensor) -> Tensor:
        return ops.expert_mlp(*args, "swiglu", impl) * 2  # type: ignore[call-arg]

    inputs = make(T=17, E=7, K=3).to(torch.float32)
    leaves = inputs.leaves()
    y = compiled(*leaves)
    got = torch.autograd.grad(y, leaves[:4], upstream(inputs).float())
    want = by_autograd(inputs, 2 * upstream(inputs), "swiglu")
    assert_close((y / 2, *got), want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fakes_promise_the_layout_that_comes(impl: str) -> None:
    """A compiler plans memory by the fakes' strides; inputs in an unusual layout must not break the promise."""

    def forward_backward(dy: Tensor, *inputs: Tensor) -> list[Tensor]:
        y, *saved = op_module._expert_mlp(*inputs, None, None, "swiglu", impl, False)
        return [y, *saved, *op_module._expert_mlp_backward(dy, *inputs, *saved, None, None, "swiglu", impl)]

    inputs = [strided(t, "transposed") for t in make(T=17, E=7, K=3).to(torch.float32)]
    inputs = [strided(torch.randn(17, 24), "transposed"), *inputs]
    with FakeTensorMode() as mode:
        fakes = forward_backward(*(mode.from_tensor(t) for t in inputs))
    for real, fake in zip(forward_backward(*inputs), fakes, strict=True):
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


# ----------------------------------------------------------------------------------------------------------- errors


def bad(**changes: Tensor | str) -> list[Tensor | str]:
    fields: dict[str, Tensor | str] = {**make(T=4, E=3, K=2, D=8, width=16)._asdict(), "activation": "swiglu"}
    return list({**fields, **changes}.values())


def f64(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (bad(activation="relu"), r"activation = 'relu': must be one of swiglu, gelu"),
        (bad(activation="gelu"), r"w_in has G = 2, but gelu needs G = 1"),
        (bad(w_in=f64(3, 1, 16, 8)), r"w_in has G = 1, but swiglu needs G = 2"),
        (bad(x=f64(1, 4, 8)), r"x \[T, D\].*got \[1, 4, 8\]"),
        (bad(w_in=f64(3, 32, 8)), r"w_in \[E, G, F, D\].*\[3, 32, 8\]"),
        (bad(w_out=f64(3, 8)), r"w_out \[E, D, F\].*\[3, 8\]"),
        (bad(ids=torch.zeros(4, dtype=torch.int64)), r"ids \[T, K\].*\[4\]"),
        (bad(weights=f64(4, 3)), r"weights and ids \[T, K\].*\[4, 3\], \[4, 2\]"),
        (bad(x=f64(4, 9)), r"do not fit together: x \[4, 9\], w_in \[3, 2, 16, 8\]"),
        (bad(x=f64(5, 8)), r"do not fit together: x \[5, 8\].*ids \[4, 2\]"),
        (bad(w_out=f64(2, 8, 16)), r"do not fit together: .*w_out \[2, 8, 16\]"),
        (bad(w_out=f64(3, 16, 8)), r"do not fit together: .*w_out \[3, 16, 8\]"),
        (bad(w_out=f64(3, 8, 16).float()), r"must have one dtype; got .*float64, .*float64, .*float32"),
        (bad(ids=torch.zeros(4, 2, dtype=torch.int32)), r"ids must be int64; got torch.int32"),
    ],
)
def test_error_says_what_is_wrong(args: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.expert_mlp(*args)


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match=r"impl = 'fast': must be one of reference, grouped, triton, or None"):
        ops.expert_mlp(*make(T=4, E=3, K=2), "swiglu", "fast")


def test_an_implementation_that_cannot_run_says_why() -> None:
    def choose(impl: str | None, D: int, width: int, dtype: torch.dtype, device: str = "cpu", biases: bool = False):
        x, w_in = torch.empty(4, D, dtype=dtype, device=device), torch.empty(2, 2, width, D, dtype=dtype, device=device)
        return op_module._choose(impl, x, w_in, "swiglu", biases)

    # "meta" stands for any device that is not the CPU.
    for D, width, dtype, device, reason in (
        (8, 16, torch.float32, "meta", "on meta it needs bfloat16, not torch.float32"),
        (8, 16, torch.float64, "cpu", "on cpu it needs bfloat16 or float32, not torch.float64"),
        (8, 16, torch.float16, "cpu", "on cpu it needs bfloat16 or float32, not torch.float16"),
        (193, 16, torch.float32, "cpu", "D = 193 must be a multiple of 4 in torch.float32"),
        (8, 18, torch.float32, "cpu", "F = 18 must be a multiple of 4 in torch.float32"),
        (12, 16, torch.bfloat16, "cpu", "D = 12 must be a multiple of 8 in torch.bfloat16"),
        (8, 20, torch.bfloat16, "meta", "F = 20 must be a multiple of 8 in torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=f'^impl = "grouped": {reason}; use "reference"$'):
            choose("grouped", D, width, dtype, device)
        assert choose(None, D, width, dtype, device) == "reference"
    assert choose(None, 4, 20, torch.float32) == choose("grouped", 4, 20, torch.float32) == "grouped"
    assert choose(None, 8, 16, torch.bfloat16) == choose(None, 8, 16, torch.bfloat16, "meta") == "grouped"
    with pytest.raises(ValueError, match=r'impl = "grouped": it takes no biases; use "reference"'):
        choose("grouped", 8, 16, torch.float32, biases=True)
    with pytest.raises(ValueError, match=r'impl = "triton": it needs bfloat16, float16 or float32, not torch.float64'):
        choose("triton", 8, 16, torch.float64)
