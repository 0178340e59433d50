"""The C kernels, for every kind of vector that this processor has, against float64 and against the modules."""

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import AttentionConfig, DenseConfig, ExpertsConfig, RouterConfig
from moe.kernels import ops, spans
from moe.kernels.cpu import library, weights
from moe.kernels.cpu.weights import Weight
from moe.kernels.quantization import quantize
from moe.serve.cpu import CpuModel
from moe.serve.pages import Pages, Segment
from tests.conftest import rel, tiny_config
from tests.test_model import lively

COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def levels() -> list[str]:
    """What the compiler calls the vectors that this processor has: of 16, 8 and 4 floats."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    found = ["native"]
    found += ["x86-64-v4"] if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags else []
    found += ["x86-64-v3"] if {"avx2", "fma", "bmi2", "f16c"} <= flags else []
    return found + (["x86-64"] if "sse2" in flags else [])


@pytest.fixture(scope="module", params=levels())
def level(request: pytest.FixtureRequest) -> library.Library:
    assert COMPILER is not None
    return library.Library(library.compiled(COMPILER, request.param))


@pytest.fixture
def compiled(level: library.Library, monkeypatch: pytest.MonkeyPatch) -> library.Library:
    monkeypatch.setattr(library, "_loaded", lambda: level)
    return level


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------------ products

# bfloat16 may round the inputs as well, where the processor multiplies such numbers.
LOST = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 1e-6, torch.int8: 1e-6}


def multiplied(lib: library.Library, weight: Weight, x_RI: torch.Tensor, expert: int = 0) -> torch.Tensor:
    y_RO = torch.full((len(x_RI), weight.outputs), torch.nan)
    memory = torch.empty((len(x_RI) + 33) * 4 * (x_RI.shape[1] + 64), dtype=torch.uint8)
    x_RI = x_RI.float().contiguous()
    lib.multiply_rows(ctypes.addressof(weight), expert, x_RI.data_ptr(), len(x_RI), y_RO.data_ptr(), memory.data_ptr())
    return y_RO


@pytest.mark.parametrize("dtype", LOST, ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (61, 24), (33, 65), (128, 96), (7, 300)])
def test_products_are_those_of_float64(
    dtype: torch.dtype, outputs: int, inputs: int, compiled: library.Library
) -> None:
    w_EOI = drawn(3, outputs, inputs)
    if dtype == torch.int8:
        data, scale = quantize(w_EOI)
        weight, w_EOI = Weight.down(w_EOI, True), data.double() * scale.double().unsqueeze(-1)
    else:
        weight, w_EOI = Weight.of(w_EOI.to(dtype)), w_EOI.to(dtype).double()
    for rows in (1, 2, 5, 6, 7, 12, 13, 16, 17, 31, 32, 33, 70):
        x_RI = drawn(rows, inputs, seed=rows)
        for e in (0, 2):
            y_RO = multiplied(compiled, weight, x_RI, e)
            assert rel(y_RO, x_RI @ w_EOI[e].t()) < LOST[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_has_the_same_bits_among_any_rows(dtype: torch.dtype, compiled: library.Library) -> None:
    weight, x_RI = Weight.of(drawn(50, 70).to(dtype)), drawn(40, 70, seed=1)
    alone = torch.cat([multiplied(compiled, weight, x_RI[i : i + 1]) for i in range(40)])
    for rows in (2, 3, 7, 11, 12, 13, 25, 40):
        assert torch.equal(multiplied(compiled, weight, x_RI[:rows]), alone[:rows])


def test_a_weight_is_a_copy(compiled: library.Library) -> None:
    """So that a runner's results do not change in the middle of an answer."""
    w_OI, x_RI = drawn(16, 8).float(), drawn(3, 8)
    weight = Weight.of(w_OI)
    before = multiplied(compiled, weight, x_RI)
    w_OI.zero_()
    assert torch.equal(multiplied(compiled, weight, x_RI), before)
    assert before.any()


# --------------------------------------------------------------------------------------------------------- whole passes

CONFIGS: list[dict[str, Any]] = [
    {},
    {"n_kv_heads": 2},
    {"n_kv_heads": 4, "tie_embeddings": True},
    {"router": RouterConfig(bias_update_rate=0.5)},
    {"dense": DenseConfig(layers=1, d_ff=37)},
    {"experts": ExpertsConfig(n_experts=5, top_k=3, d_ff=35, activation="gelu")},
    {"experts": ExpertsConfig(n_experts=37, top_k=1, d_ff=20)},
    {"d_model": 160, "attention": AttentionConfig(n_heads=40, n_kv_heads=1, head_dim=48)},
]
# Of logits: float32's rounding; of bfloat16 and float16 the weights are the same, and what passes between layers is not
# rounded to them.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 1e-3}
BLOCK = 3


def model_of(changes: dict[str, Any], dtype: torch.dtype, max_seq_len: int = 64) -> Any:
    model: Any = lively(dataclasses.replace(tiny_config(**changes), max_seq_len=max_seq_len), dtype)
    for block in model.blocks:
        if block.moe is not None and block.moe.router.bias_E is not None:
            block.moe.router.bias_E.copy_(torch.tensor([0.9, -0.4, 0.1, -0.2, 0.5]))
    return model


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(61, (n,), generator=g).tolist() for n in lengths]


def logits_of(run: CpuModel, tokens: list[list[int]], pieces: list[int], size: int = BLOCK) -> list[torch.Tensor]:
    """Of every position of each text, in passes of so many tokens of all; the blocks are in disorder."""
    g = torch.Generator().manual_seed(1)
    counts = [-(-len(t) // size) for t in tokens]
    order = torch.randperm(sum(counts), generator=g).split(counts)
    at, found = [0] * len(tokens), [[] for _ in tokens]
    for n in pieces:
        live = [i for i, t in enumerate(tokens) if at[i] < len(t)]
        segments = [Segment(tokens[i][at[i] : at[i] + n], at[i], order[i].tolist()) for i in live]
        rows = [len(s.token_ids) for s in segments]
        logits, _ = run(segments, range(sum(rows)), False)
        for i, part in zip(live, logits.split(rows), strict=True):
            found[i].append(part)
            at[i] += len(part)
    return [torch.cat(parts) for parts in found]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@torch.no_grad()
def test_logits_are_those_of_float64_modules(changes: dict[str, Any], dtype: torch.dtype, compiled: Any) -> None:
    model = model_of(changes, dtype)
    tokens = texts([23, 1, 40, 9])
    pages = Pages(model.cfg, 40, BLOCK, dtype, "cpu")
    got = logits_of(CpuModel(model, pages), tokens, [20, 1, 1, 18])
    exact = model.double()
    for logits, ids in zip(got, tokens, strict=True):
        assert logits.dtype == dtype
        want = exact(torch.tensor([ids])).logits_BSV[0]
        if dtype == torch.float32:
            assert rel(logits, want) < CLOSE[dtype]
            continue
        # Where a router is nearly undecided, another expert may be chosen: of most positions that is not so.
        wrong = (logits.double() - want).norm(dim=1) / want.norm(dim=1)
        assert wrong.median() < CLOSE[dtype]


@pytest.mark.parametrize("quantized", [False, True])
@torch.no_grad()
def test_experts_in_eight_bits_are_those_of_rounded_weights(quantized: bool, compiled: Any) -> None:
    model = model_of({}, torch.float32)
    tokens = texts([23, 12])
    got = logits_of(CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"), quantized), tokens, [20, 3])
    for block in model.blocks if quantized else ():
        for p in block.moe.experts.parameters():
            data, scale = quantize(p)
            p.copy_(data * scale.unsqueeze(-1))
    exact = model.double()
    for logits, ids in zip(got, tokens, strict=True):
        assert rel(logits, exact(torch.tensor([ids])).logits_BSV[0]) < 2e-6


@pytest.mark.parametrize("kept", ["bfloat16", "float16", "int8", "fp8"])
@torch.no_grad()
def test_keys_and_values_are_kept_as_torch_rounds_them(kept: str, compiled: Any) -> None:
    """The first layer's, which depend on no others."""
    model = model_of({"n_kv_heads": 2}, torch.float32)
    tokens, filled = texts([23]), {}
    for dtype in ("float32", kept):
        pages = filled[dtype] = Pages(model.cfg, 8, BLOCK, torch.float32, "cpu", dtype)
        logits_of(CpuModel(model, pages), tokens, [20, 3])
    plain, narrow = filled["float32"], filled[kept]
    for i, (exact_PNC, kept_PNC) in enumerate(zip(plain.layers[0], narrow.layers[0], strict=True)):
        if narrow.scales is None:
            assert torch.equal(kept_PNC, exact_PNC.to(narrow.dtype))
            continue
        data, scale = quantize(exact_PNC[: 23 // BLOCK * BLOCK], narrow.dtype)
        assert exact_PNC.any()
        written = exact_PNC.flatten(1).any(1).nonzero().flatten()
        data, scale = quantize(exact_PNC[written], narrow.dtype)
        assert torch.equal(kept_PNC[written].view(torch.int8), data.view(torch.int8))
        assert torch.equal(narrow.scales[0][i][written], scale)


@torch.no_grad()
def test_eight_bit_keys_and_values_lose_what_rounding_loses(compiled: Any) -> None:
    model = model_of({}, torch.float32)
    tokens = texts([40, 17])
    plain = logits_of(CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu")), tokens, [30, 10])
    for kept, lost in (("bfloat16", 2e-2), ("float16", 3e-3), ("int8", 5e-2), ("fp8", 3e-1)):
        pages = Pages(model.cfg, 40, BLOCK, torch.float32, "cpu", kept)
        got = logits_of(CpuModel(model, pages), tokens, [30, 10])
        # The median of positions: at some another expert is chosen.
        wrong = torch.cat([(a - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(got, plain, strict=True)]).median()
        assert lost / 1000 < wrong < lost


@torch.no_grad()
def test_long_requests_are_shared_by_threads_without_a_trace(compiled: Any) -> None:
    """More than SPLIT positions are cut and merged: the same bits on one thread and on two, alone and in company, and
    float64's logits."""
    model = model_of({"n_kv_heads": 2}, torch.float32, 2600)
    long, *others = texts([2500, 30, 1300, 20, 20, 20, 20, 20])
    threads, found = torch.get_num_threads(), []
    try:
        for n, company in ((1, []), (2, []), (2, others), (3, others)):
            torch.set_num_threads(n)
            pages = Pages(model.cfg, 260, 16, torch.float32, "cpu")
            found.append(logits_of(CpuModel(model, pages), [long, *company], [1100, 1390, 1, 9], 16)[0])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other, found[0])
    assert rel(found[0], model.double()(torch.tensor([long])).logits_BSV[0]) < 5e-6


@torch.no_grad()
def test_an_expert_of_nan_spoils_its_own_rows_only(compiled: Any) -> None:
    model = model_of({}, torch.float32)
    tokens = texts([1] * 40)
    run = CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"))
    segments = [Segment(t, 0, [i]) for i, t in enumerate(tokens)]
    before, routing = run(segments, range(40), True)
    model.blocks[-1].moe.experts.w_in_EGFD[2] = torch.nan
    after, _ = CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"))(segments, range(40), False)
    touched = (routing[-1][0] == 2).any(1)
    assert 0 < touched.sum() < 40
    assert torch.equal(after[~touched], before[~touched])
    assert after[touched].isnan().all()


@torch.no_grad()
def test_routing_is_the_gates_with_ties_to_the_lower_expert(compiled: Any) -> None:
    model = model_of({}, torch.float32)
    for block in model.blocks:
        block.moe.router.weight[3] = block.moe.router.weight[1]
    tokens = texts([40])
    run = CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"))
    _, routing = run([Segment(tokens[0], 0, range(14))], [39], True)
    want = model(torch.tensor(tokens)).routing
    for (ids_TK, weights_TK), theirs in zip(routing, want, strict=True):
        assert torch.equal(ids_TK, theirs.ids_TK)
        assert rel(weights_TK, theirs.weights_TK) < 1e-6
    assert any((ids_TK == torch.tensor([1, 3])).all(1).any() for ids_TK, _ in routing)


def test_phases_one_by_one_are_the_pass(compiled: Any) -> None:
    model = model_of({"dense": DenseConfig(layers=1, d_ff=37)}, torch.float32)
    run = CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"))
    segments, heard = [Segment(texts([20])[0], 0, range(7))], []

    def listen(component: str, phase: str) -> Any:
        heard.append(component)
        return spans._SILENCE

    whole, _ = run(segments, [3, 19], False)
    with spans.listening(listen):
        apart, _ = run(segments, [3, 19], False)
    assert torch.equal(whole, apart)
    assert heard[0] == "embedding"
    assert heard[-1] == "head"
    assert {"mlp", "router", "permute", "up", "down", "combine", "norm", "projections", "attention"} <= set(heard)


@torch.no_grad()
def test_activations_are_the_ops(compiled: Any) -> None:
    """Over all of their range: what is large, tiny or no number included."""
    values = torch.cat([torch.linspace(-120, 120, 1999), torch.tensor([0.0, -0.0, 1e-30, torch.inf, -torch.inf])])
    for activation, gates in (("swiglu", 2), ("gelu", 1)):
        width = len(values)
        h = values if gates == 1 else torch.stack([values, torch.ones(width)])
        want = ops.activate(h.double().view(1, gates, width), activation)[0]
        # One input of 1: a weight's row is a pre-activation; the second product picks them out again.
        w_in = h.view(1, gates, width, 1)
        up, down = Weight.up(w_in, False), Weight.of(torch.ones(1, width))
        got = torch.full((width,), torch.nan)
        up_at, down_at = ctypes.addressof(up), ctypes.addressof(down)
        compiled.activate_row(up_at, weights.ACTIVATIONS[activation], down_at, got.data_ptr())
        finite = want.isfinite() & (want.abs() > 1e-30)
        assert rel(got[finite], want[finite]) < 1e-6
        # Far out the exact form cancels, in float64 too.
        some = finite & (want.abs() > 1e-6)
        assert ((got[some].double() - want[some]) / want[some]).abs().max() < 2e-6
        assert torch.equal(got.isfinite(), want.isfinite())


def test_ids_outside_of_the_vocabulary_are_named(compiled: Any) -> None:
    model = model_of({}, torch.float32)
    run = CpuModel(model, Pages(model.cfg, 40, BLOCK, torch.float32, "cpu"))
    for wrong in (-1, 61):
        with pytest.raises(ValueError, match=rf"token id {wrong}: must be in \[0, 61\)"):
            run([Segment([3, wrong], 0, [0])], [1], False)


# ---------------------------------------------------------------------------------------------------- being compiled


def test_a_file_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMPILER is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = library.compiled(COMPILER)
    made = path.stat().st_mtime_ns
    assert library.compiled(COMPILER) == path
    assert path.stat().st_mtime_ns == made
    assert [p.name for p in (tmp_path / "gpt4-moe").iterdir()] == [path.name]


def said(environment: dict[str, str]) -> str:
    """Why a new process has no kernels."""
    code = "from moe.kernels.cpu import library; print(library.why_not())"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return run.stdout.strip()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert said({library.SWITCH: "0"}) == "GPT4_MOE_CPU_KERNELS = 0 forbids them"
    assert said({}) == "None"
    assert said({"PATH": str(tmp_path), "CC": ""}) == "no C compiler is installed: install gcc"
    refuses = tmp_path / "refuses"
    refuses.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho cannot >&2; exit 1\n")
    refuses.chmod(0o755)
    assert said({"CC": str(refuses)}) == f"{refuses} cannot compile the kernels: cannot"
    file = tmp_path / "file"
    file.write_text("")
    assert said({"XDG_CACHE_HOME": str(file)}).startswith("the compiled kernels cannot be kept or loaded: ")
