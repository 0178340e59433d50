"""What needs a CUDA GPU: large shapes, bfloat16, offsets beyond 2^31, bitwise repeatability, graphs, the model.

On any card: which kernels it takes is for kernels/tiles.py to say, and asserted only where a test is about one of them.
The shapes stand here by name because benchmarks/precompile.py compiles them on all cores beforehand.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from moe.kernels import ops
from moe.kernels.experts import op
from tests.conftest import rel, tiny_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
ROOT = Path(__file__).parent.parent.parent
LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-5}
SHAPES = [  # T, E, K, D, F: some rows an expert; odd widths; many rows; many experts; one token; all experts
    (64, 4, 2, 64, 128),
    (727, 5, 2, 577, 859),
    (8192, 16, 2, 512, 1024),
    (4096, 64, 8, 256, 128),
    (1, 16, 2, 512, 1024),
    (300, 7, 7, 256, 512),
]
GRAPH_TOKENS = (256, 2048)  # 32 and 256 rows an expert
GRAPH_SHAPE = (16, 2, 512, 1024)
WRAPPED_SHAPE = (512, 8, 2, 256, 512)
FEW_TOKENS = (1, 3, 40, 500)
FEW_SHAPE = (16, 2, 512, 1024)
PAGED_HEADS = [(168, 1, 128), (32, 8, 128), (4, 4, 64), (6, 1, 80)]  # H, N, C
HEADS = [(1, 257), (515, 8192), (4500, 50257), (4300, 100352)]  # T, V


def named(values: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{n}" for letter, n in zip("TEKDF", values, strict=True))


def copies_rows(inputs: list[torch.Tensor]) -> bool:
    """Whether these go through TMA."""
    from moe.kernels.experts import triton_mlp

    return triton_mlp.copies_rows(inputs[0], triton_mlp.Experts(inputs[1], inputs[2]), inputs[4].numel())


def tensors(T: int, E: int, K: int, D: int, width: int, dtype: torch.dtype, gates: int = 2) -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device="cuda", dtype=dtype)

    weights = torch.randn(T, K, generator=g, device="cuda").softmax(-1)
    ids = torch.rand(T, E, generator=g, device="cuda").argsort(1)[:, :K]
    return [normal(T, D), normal(E, gates, width, D) / D**0.5, normal(E, D, width) / width**0.5, weights, ids]


def run(inputs: list[torch.Tensor], activation: str = "swiglu", impl: str | None = "triton") -> torch.Tensor:
    x, w_in, w_out, weights, ids = inputs
    return ops.expert_mlp(x, w_in, w_out, weights, ids, activation, impl)


def step(inputs: list[torch.Tensor], activation: str, impl: str | None, recompute: bool = False) -> list[torch.Tensor]:
    leaves = x, w_in, w_out, weights = [t.detach().requires_grad_() for t in inputs[:4]]
    y = ops.expert_mlp(x, w_in, w_out, weights, inputs[4], activation, impl, recompute=recompute)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=named)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_small_and_large_against_float64(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    inputs = tensors(*shape, dtype=dtype, gates=ops.ACTIVATIONS[activation])
    want = step([t.double() if t.is_floating_point() else t for t in inputs], activation, "reference")
    for name, a, b in zip(
        ("y", "dx", "dw_in", "dw_out", "dweights"), step(inputs, activation, "triton"), want, strict=True
    ):
        assert rel(a, b) < LIMIT[dtype], name
        worst = (a.double() - b).abs().max() / b.abs().max()
        assert worst < 2 * LIMIT[dtype], name


@pytest.mark.parametrize("recompute", [False, True])
def test_twice_gives_the_same_bits(recompute: bool) -> None:
    inputs = tensors(8192, 16, 2, 512, 1024, torch.bfloat16)
    first, second = (step(inputs, "swiglu", "triton", recompute=recompute) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_beyond_the_reach_of_32_bits() -> None:
    """R * 2F and E * 2F * D above 2^31: the last rows and the last expert must be right."""
    T, E, K, D, width = 24576, 16, 2, 4096, 24576
    x, w_in, w_out, weights, ids = tensors(T, E, K, D, width, torch.bfloat16)
    assert T * K * 2 * width > 2**31
    assert E * 2 * width * D > 2**31
    with torch.no_grad():
        y = ops.expert_mlp(x, w_in, w_out, weights, ids, "swiglu", "triton")
        last = slice(T - 64, T)
        want = ops.expert_mlp(x[last], w_in, w_out, weights[last], ids[last], "swiglu", "reference")
    assert rel(y[last], want) < 2e-2


@pytest.mark.parametrize("tokens", GRAPH_TOKENS)
def test_a_cuda_graph_replays_with_new_routing(tokens: int) -> None:
    inputs = tensors(tokens, *GRAPH_SHAPE, dtype=torch.bfloat16)
    other = tensors(tokens, *GRAPH_SHAPE, dtype=torch.bfloat16)
    other[4] = (other[4] + 3) % 16
    if torch.cuda.get_device_capability() == (9, 0):
        assert copies_rows(inputs) == (tokens == 2048), "one of the two is to be about TMA"
    with torch.no_grad():
        for _ in range(2):
            run(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run(inputs)
        for target, source in zip(inputs, other, strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(y, run(other))


@pytest.mark.parametrize("how", ["checkpointed", "compiled"])
def test_wrapped_it_gives_the_same_bits(how: str) -> None:
    inputs = tensors(*WRAPPED_SHAPE, dtype=torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in inputs[:4]]
    calls = []

    def counted(*given: Any) -> torch.Tensor:
        calls.append(given)
        return ops.expert_mlp(*given, activation="swiglu", impl="triton")

    @torch.compile(fullgraph=True)
    def compiled(*given: Any) -> torch.Tensor:
        return ops.expert_mlp(*given, activation="swiglu", impl="triton")

    if how == "checkpointed":
        y = checkpoint(counted, *leaves, inputs[4], use_reentrant=False)
    else:
        y = compiled(*leaves, inputs[4])
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y)
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    assert len(calls) == (2 if how == "checkpointed" else 0), "the forward runs again for the backward"
    for a, b in zip(got, step(inputs, "swiglu", "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_tensors_of_another_gpu_than_the_current_one() -> None:
    inputs = [t.to("cuda:1") for t in tensors(*WRAPPED_SHAPE, dtype=torch.bfloat16)]
    assert torch.cuda.current_device() == 0
    for a, b in zip(step(inputs, "swiglu", "triton"), step(inputs, "swiglu", "reference"), strict=True):
        assert a.device == inputs[0].device
        assert rel(a, b) < LIMIT[torch.bfloat16]
    logits = torch.randn(70, 16, device="cuda:1")
    for a, b in zip(ops.topk_gate(logits, 2, impl="triton"), ops.topk_gate(logits, 2, impl="reference"), strict=True):
        assert rel(a, b) < 1e-6
    outer = [t.to("cuda:1") for t in head(515, 192, 8192, torch.bfloat16)]
    for a, b in zip(head_step(outer), head_step(outer, "torch"), strict=True):
        assert a.device == logits.device
        assert rel(a, b) < 1e-2
    assert torch.cuda.current_device() == 0


def test_the_default_on_cuda_is_triton_and_the_model_trains_with_it() -> None:
    import moe

    x, w_in = (torch.empty(*shape, 8, device="cuda", dtype=torch.bfloat16) for shape in ((4,), (2, 2, 16)))
    assert op._choose(None, x, w_in, "swiglu", False) == "triton"
    model = moe.Transformer(tiny_config(d_model=32)).cuda()
    tokens = torch.randint(61, (4, 33), device="cuda")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -------------------------------------------------------------------------------------- output layer + cross-entropy


def head(T: int, D: int, V: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    x, w = (torch.randn(n, D, generator=g, device="cuda").to(dtype) for n in (T, V))
    targets = torch.randint(V, (T,), generator=g, device="cuda")
    return [x, w / D**0.5, targets.masked_fill(torch.rand(T, generator=g, device="cuda") < 0.2, -100)]


def head_step(inputs: list[torch.Tensor], impl: str | None = None) -> list[torch.Tensor]:
    x, w = (t.detach().requires_grad_() for t in inputs[:2])
    total = ops.linear_cross_entropy(x, w, inputs[2], impl)
    return [total.detach(), *torch.autograd.grad(total, (x, w))]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(("T", "V"), HEADS, ids=str)
def test_cross_entropy_against_float64(T: int, V: int, dtype: torch.dtype) -> None:
    x, w, targets = head(T, 192, V, dtype)
    if T == 1:
        targets.fill_(0)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    want = F.cross_entropy(leaves[0] @ leaves[1].t(), targets, ignore_index=-100, reduction="sum")
    wanted = [want.detach(), *torch.autograd.grad(want, leaves)]
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for name, a, b in zip(("loss", "dx", "dw"), head_step([x, w, targets]), wanted, strict=True):
        assert rel(a, b) < (limit if name != "loss" else limit / 10), name


def test_cross_entropy_twice_gives_the_same_bits_and_waits_for_nothing() -> None:
    inputs = head(9000, 256, 32768, torch.bfloat16)
    first = head_step(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = head_step(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_cross_entropy_under_autocast_sums_in_float32_and_never_holds_all_logits() -> None:
    T, D, V = 16384, 128, 65536
    x, w, targets = head(T, D, V, torch.float32)
    x, w = x.requires_grad_(), w.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", torch.bfloat16):
        total = ops.linear_cross_entropy(x, w, targets)
    dx, dw = torch.autograd.grad(total, (x, w))
    assert torch.cuda.max_memory_allocated() - before < 0.5 * T * V * 2
    assert dx.dtype == dw.dtype == torch.float32
    want = head_step([x.detach().bfloat16(), w.detach().bfloat16(), targets], "torch")
    for a, b in zip((total, dx, dw), want, strict=True):
        assert rel(a, b) < 1e-2


# ----------------------------------------------------------------------------------------------------- launches


def launched(inputs: list[torch.Tensor], **settings: Any) -> list[torch.Tensor]:
    """y and all gradients for an upstream gradient of ones."""
    leaves = x, w_in, w_out, weights = [t.detach().requires_grad_() for t in inputs[:4]]
    impl = "reference" if x.dtype == torch.float64 else "triton"
    y = ops.expert_mlp(x, w_in, w_out, weights, inputs[4], "swiglu", impl, **settings)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


@pytest.mark.parametrize(
    ("precision", "least", "most"), [("ieee", 0.0, 1e-5), ("tf32x3", 0.0, 1e-5), ("tf32", 2e-5, 2e-3)]
)
def test_float32_is_as_exact_as_was_asked(precision: str, least: float, most: float) -> None:
    """Rounded to 10 bits, operands are off by up to 2^-11; what is left of them, taken along, leaves 2^-21."""
    inputs = tensors(512, 8, 2, 512, 1024, torch.float32)
    want = launched([t.double() if t.is_floating_point() else t for t in inputs])
    for name, a, b in zip(
        ("y", "dx", "dw_in", "dw_out", "dweights"), launched(inputs, precision=precision), want, strict=True
    ):
        assert least <= rel(a, b) < most, name


@pytest.mark.parametrize("tokens", [1, 8192])
@pytest.mark.parametrize("wrong", [-1, 16, 2**32])
def test_an_id_outside_is_an_assertion_on_the_device(tokens: int, wrong: int) -> None:
    """In a process of its own, which has no use for CUDA any more."""
    script = f"""
import torch
from moe.kernels import ops
empty = lambda *shape: torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
ids = torch.zeros({tokens}, 2, dtype=torch.int64, device="cuda")
ids[-1, -1] = {wrong}
weights = torch.ones({tokens}, 2, device="cuda")
ops.expert_mlp(empty({tokens}, 64), empty(16, 2, 64, 64), empty(16, 64, 64), weights, ids)
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


# ------------------------------------------------------------------------------------------------------------ decoding


def kept_in(kept: torch.dtype, device: str = "cuda") -> None:
    from moe.kernels import cards

    if kept == torch.float8_e4m3fn and (reason := cards.why_not_e4m3(torch.device(device))):
        pytest.skip(reason)


@pytest.mark.parametrize("T", FEW_TOKENS)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_experts_of_few_tokens_against_float64(kept: torch.dtype, T: int) -> None:
    kept_in(kept)
    x, w_in, w_out, weights, ids = tensors(T, *FEW_SHAPE, torch.bfloat16)
    with torch.no_grad():
        if kept == torch.bfloat16:
            got = ops.expert_mlp_inference(x, w_in, w_out, weights, ids, "swiglu")
            alike = ops.expert_mlp_inference(x, w_in, w_out, weights, ids, "swiglu", batch_invariant=True)
            want = run([x.double(), w_in.double(), w_out.double(), weights.double(), ids], impl="reference")
        else:
            small = ops.quantize_experts(w_in, w_out, kept)
            got = ops.expert_mlp_quantized(x, small, weights, ids, "swiglu")
            alike = ops.expert_mlp_quantized(x, small, weights, ids, "swiglu", batch_invariant=True)
            want = ops.expert_mlp_quantized(x.double(), small, weights.double(), ids, "swiglu", "reference")
    assert rel(got, want) < 2e-2
    assert rel(alike, want) < 2e-2


@pytest.mark.parametrize("dtype", LIMIT)
def test_tokens_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, w_in, w_out, weights, ids = tensors(300, *FEW_SHAPE, dtype)

    def call(rows: slice) -> torch.Tensor:
        given = x[rows], w_in, w_out, weights[rows], ids[rows]
        return ops.expert_mlp_inference(*given, "swiglu", batch_invariant=True)

    with torch.no_grad():
        whole = call(slice(None))
        for rows in (slice(0, 1), slice(7, 8), slice(5, 60), slice(100, 300)):
            assert torch.equal(call(rows), whole[rows])


@pytest.mark.parametrize(("H", "N", "C"), PAGED_HEADS)
@pytest.mark.parametrize(
    "kept", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_paged_attention_against_float64_and_on_bits(kept: torch.dtype, H: int, N: int, C: int) -> None:
    kept_in(kept)
    g = torch.Generator("cuda").manual_seed(0)
    lengths, S, B, size = [1, 700, 5000, 2049], 3, 320, 16
    dtype = torch.bfloat16 if kept.itemsize == 1 else kept
    wide = [torch.randn(4 * B * size, N, C, generator=g, device="cuda") for _ in "kv"]
    pairs = [ops.quantize(x, kept) if kept.itemsize == 1 else (x.to(kept), None) for x in wide]
    (k, k_scale), (v, v_scale) = pairs
    blocks = torch.randperm(4 * B, generator=g, device="cuda").int().view(4, B)
    rows = [min(n, S) for n in lengths]
    starts = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    q = torch.randn(sum(rows), H, C, generator=g, device="cuda").to(dtype)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: slice, starts: torch.Tensor, impl: str) -> Any:
        return ops.paged_attention(
            q, k, v, blocks[chosen], starts, torch.tensor(lengths, device="cuda").int()[chosen], size,
            max_query_len=S, max_seq_len=max(lengths), k_scale_PN=k_scale, v_scale_PN=v_scale, impl=impl,
        )  # fmt: skip

    got = call(q, k, v, slice(None), starts, "triton")
    plain = (k, v) if kept.itemsize == 1 else (k.double(), v.double())
    assert rel(got, call(q.double(), *plain, slice(None), starts, "reference")) < LIMIT[dtype]
    for i, n in enumerate(rows):
        own = slice(int(starts[i]), int(starts[i + 1]))
        alone = call(q[own], k, v, slice(i, i + 1), torch.tensor([0, n], device="cuda").int(), "triton")
        assert torch.equal(alone, got[own])


def test_decoding_through_graphs_is_decoding() -> None:
    from moe import Transformer
    from moe.serve.engine import Engine
    from moe.serve.request import SamplingParams

    model = Transformer(tiny_config(), seed=3).to("cuda")
    prompts = [[1 + i] * (3 + i) for i in range(5)]
    outputs = Engine(model).generate(prompts, SamplingParams(temperature=0, max_tokens=12))
    for prompt, output in zip(prompts, outputs, strict=True):
        want = model.generate(torch.tensor([prompt], device="cuda"), 12, temperature=0)[0, len(prompt) :]
        assert output.token_ids == want.tolist()
