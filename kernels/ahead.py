"""Compile every kernel and shipped tile configuration for GPUs this machine need not have, and say what came out.

The launches are recorded from the host code itself, on tensors without storage, so what is compiled is what would run:
same arguments, same specialisation. Printed per kernel: registers; spills, and how many of them are in the main loop;
shared memory, and what arithmetic expects of it; how many blocks fit a multiprocessor; the widths in bytes in which the
main loop reads global memory (none: through TMA); tensor-core instructions, of warp groups and of warps.

Run: python -m moe.kernels.ahead [--arch sm_80 sm_90] [--only NAME] [--once] [--jobs N]. Exit code 1: a limit is broken.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import starmap
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels import cards, sass, tile_model, tiles
from moe.kernels.attention import triton_paged
from moe.kernels.cards import CARDS, e4m3_refusal, refusal
from moe.kernels.experts import (
    inference,
    triton_few,
    triton_gluon,
    triton_mlp,
    triton_pointer,
    triton_routes,
    triton_rows,
    triton_tma,
)
from moe.kernels.gate import triton_gate
from moe.kernels.isolated import side_by_side
from moe.kernels.loss import triton_chunked
from moe.kernels.tiles import Tile

TARGETS = {
    arch: GPUTarget("hip", arch, 64) if card.capability is None else GPUTarget("cuda", int(arch[3:]), 32)
    for arch, card in CARDS.items()
    if not refusal(card)
}
MODULES = (
    triton_gate,
    triton_routes,
    triton_rows,
    triton_pointer,
    triton_tma,
    triton_gluon,
    triton_few,
    triton_paged,
    triton_chunked,
)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch, ready to compile."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    warps: int
    stages: int
    options: tuple[tuple[str, Any], ...] = ()  # all others of the compiler's

    @property
    def name(self) -> str:
        """Module and kernel; of weights, keys or values in eight bits the module has an 8 behind it."""
        module = self.kernel.fn.__module__.rpartition(".")[2].removeprefix("triton_")
        module += "8" * any(kind in ("*i8", "*fp8e4nv") for _, kind in self.signature)
        return f"{module}.{self.kernel.fn.__name__.removesuffix('_kernel').strip('_')}"

    @property
    def is_product(self) -> bool:
        return any(name in ("BK", "BR") for name, _ in self.constants) and "bias" not in self.name

    @property
    def tile(self) -> str:
        c = dict(self.constants)
        sizes = [c[n] for n in ("BM", "BN", "BK", "BC", "BR") if n in c]
        return "x".join(map(str, sizes)) if self.is_product else ""


@dataclass
class Report:
    """What the compiler made of a launch."""

    launch: Launch
    registers: int = 0
    spills: int = 0  # stores to local memory, anywhere
    shared: int = 0
    wgmma: int = 0  # instructions that read shared memory: wgmma, or Blackwell's tcgen05
    mma: int = 0  # those that read registers: mma.sync, or AMD's mfma
    loop: sass.Loop = field(default_factory=sass.Loop)  # stays empty for AMD's cards
    problem: str = ""

    def blocks(self, arch: str) -> int:
        """How many blocks fit a multiprocessor of NVIDIA's: 65,536 registers; CUDA keeps 1,024 B a block."""
        threads = 32 * self.launch.warps
        by_registers = 65_536 // (threads * -(-self.registers // 8) * 8) if self.registers else 0
        return min(by_registers, 2048 // threads, (CARDS[arch].shared + 1024) // (self.shared + 1024))

    def row(self, arch: str) -> str:
        blocks = "" if arch.startswith("gfx") else self.blocks(arch)
        widths = "+".join(map(str, sorted(self.loop.loads)))
        return (
            f"{self.launch.name:28} {self.launch.tile:15} {self.launch.warps:5} {self.launch.stages:6} "
            f"{self.registers:4} {self.spills:6} {self.loop.spills:4} {self.shared:8,} {about(self.launch, arch):>8} "
            f"{blocks:6} {widths:5} {self.wgmma:5} {self.mma:4}  {self.problem}"
        )


def about(launch: Launch, arch: str) -> str:
    """A product's shared memory as tile_model.py reckons it: what `tune` goes by before anything is compiled."""
    if not launch.is_product or not launch.name.startswith(("pointer.", "tma.")):
        return ""
    c, short = dict(launch.constants), launch.name.partition(".")[2]
    dw, itemsize = "BR" in c, 4 if "fp32" in launch.signature[0][1] else 2
    columns, depth = (c["BC"], c["BR"]) if dw else (c["BN"], c["BK"])
    tile = Tile(columns, depth, launch.warps, launch.stages, split=c.get("SPLIT", 1), rows=c["BN"])
    name, on_tensor_cores = "dw" if dw else short, itemsize == 2 or c["PRECISION"] != "ieee"
    tma = launch.name.startswith("tma.")
    return f"{tile_model.shared_bytes(CARDS[arch], name, tile, c.get('BM', 0), tma, itemsize, on_tensor_cores):,}"


# --------------------------------------------------------------------------------------------------------- recording


class _Recorder:
    """Stands in for a kernel: keeps the launches, runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = getattr(kernel, "jit", kernel), launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(_launch(self.kernel, args, kwargs))


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    # In Gluon stages are the kernel's own.
    warps, stages = kwargs.pop("num_warps", 4), kwargs.pop("num_stages", kwargs.get("STAGES", 3))
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        kind = "constexpr" if parameter.is_constexpr else _kind(value, not parameter.do_not_specialize)
        if kind == "constexpr":
            constants.append((parameter.name, value))
        elif not parameter.do_not_specialize_on_alignment and _is_divisible(value, not parameter.do_not_specialize):
            divisible.append(position)
        signature.append((parameter.name, kind))
    options = {"debug": True} if kernel.debug else {}
    options |= values
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages, tuple(options.items()))


def _is_divisible(value: Any, specialize: bool) -> bool:
    """Whether the compiler is told that an integer, or an address, is a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return specialize and isinstance(value, int) and value % 16 == 0


def _kind(value: Any, specialize: bool) -> str:
    """The type by which Triton specialises a runtime argument."""
    if value is None or (specialize and isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}[{', '.join(map(str, value.block_shape))}]>"
    if isinstance(value, triton_gluon.TensorDescriptor):
        box = ",".join(map(str, value.block_shape))
        return f"tensordesc<{_TYPES[value.base.dtype]}[{box}],{value.layout!r}>"
    return "i32" if abs(value) < 2**31 else "i64"


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Inside, the host code of the kernels records its launches, for the tiles of `arch`."""
    launches: list[Launch] = []
    patches = [
        patch.object(module, name, _Recorder(kernel, launches))
        for module in MODULES
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    ]
    patches += [
        patch.object(tiles, "INTERPRETED", False),
        patch.object(tiles, "GLUON", False),
        patch.object(cards, "card", lambda device: CARDS[arch]),
        patch.object(tiles, "tuned", lambda card: {}),
    ]
    for p in patches:
        p.start()
    try:
        yield launches
    finally:
        for p in patches:
            p.stop()


def launches(arch: str) -> list[Launch]:
    """Every different launch of training and inference at typical shapes, for the tiles of `arch`."""
    with recording(arch) as found:
        for dtype, activation, few, d_model, d_ff in (
            (torch.bfloat16, "swiglu", False, 10752, 28672),
            (torch.bfloat16, "gelu", False, 10752, 43008),
            (torch.float16, "swiglu", False, 4096, 14336),
            (torch.float32, "swiglu", False, 1536, 4096),
            (torch.bfloat16, "swiglu", True, 10752, 28672),
        ):
            # A row per expert, some rows per expert, and enough for full tiles.
            for tokens in (8, 256) if few else (8192,):
                _record(tokens, d_model, d_ff, dtype, activation, _strided if few else _contiguous)
                _record(tokens, d_model, d_ff, dtype, activation, _contiguous)
        for layout in (_strided, _pairs):
            _record(8192, 4096, 14336, torch.bfloat16, "swiglu", layout)
        _record(8192, 2880, 2880, torch.bfloat16, "swiglu_oai", _interleaved)
        for precision in cards.precisions(CARDS[arch])[1:]:
            _record(8192, 1536, 4096, torch.float32, "swiglu", _contiguous, precision)
        if arch == "sm_90":
            with patch.object(tiles, "GLUON", True):
                _record(8192, 10752, 28672, torch.bfloat16, "swiglu", _contiguous)
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in (8, 1, 64):
                _record_inference(tokens, 10752, 28672, dtype, dtype)
            _record_inference(8, 10752, 28672, dtype, dtype, batch_invariant=True)
        for narrow in _narrow(arch):
            for tokens in (8, 1, 64, 512, 8192):
                _record_inference(tokens, 10752, 28672, torch.bfloat16, narrow)
            _record_inference(8, 10752, 28672, torch.bfloat16, narrow, batch_invariant=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            # One key head for many, for few and for one, and wide heads.
            for heads, shared, width in ((168, 168, 128), (32, 8, 128), (24, 24, 64), (16, 1, 256)):
                for kept in (dtype, *(_narrow(arch) if dtype == torch.bfloat16 else ())):
                    _record_paged(heads, heads // shared, width, dtype, kept)
        logits = torch.empty(8192, 16, device="meta")
        for bias in (None, logits[0]):
            weights, ids = triton_gate.gate(logits, 2, bias)
            triton_gate.gate(logits, 2, bias, ids)
            triton_gate.gate_backward(weights, weights, ids, 16)
        for vocabulary in (8192, 32768, 50257, 100352):  # rows in registers, and larger ones
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                x, w = (torch.empty(n, 64, device="meta", dtype=dtype) for n in (8192, vocabulary))
                for want_grad in (True, False):
                    triton_chunked.linear_cross_entropy(x, w, ids[:, 0], want_grad)
    return list(dict.fromkeys(found))


Empty = Callable[..., torch.Tensor]
Layout = Callable[[Empty, int, int, int, int], triton_pointer.Experts]


def _record(
    tokens: int,
    d_model: int,
    d_ff: int,
    dtype: torch.dtype,
    activation: str,
    layout: Layout,
    precision: str | None = None,
) -> None:
    E, K = 16, 2

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(tokens, d_model)
    weights, ids = empty(tokens, K, dtype=torch.float32), empty(tokens, K, dtype=torch.int64)
    experts = layout(empty, E, 1 if activation == "gelu" else 2, d_ff, d_model)._replace(precision=precision)
    _, h, order, offsets = triton_mlp.forward(x, experts, weights, ids, activation, True)
    triton_mlp.backward(x, x, experts, weights, h, order, offsets, activation)
    triton_mlp.backward(x, x, experts, weights, h[:0], order, offsets, activation)
    triton_mlp.forward(x, experts, weights, ids, activation, False)


def _narrow(arch: str) -> list[torch.dtype]:
    """The eight-bit types that a card reads."""
    return [torch.int8] + [torch.float8_e4m3fn] * (e4m3_refusal(CARDS[arch]) is None)


def _record_inference(
    tokens: int, d_model: int, d_ff: int, dtype: torch.dtype, kept: torch.dtype, batch_invariant: bool = False
) -> None:
    """The expert MLP of weights kept in another type, with scales then."""
    E, K, meta = 16, 2, torch.device("meta")
    w_in, w_out = (torch.empty(s, dtype=kept, device=meta) for s in ((E, 2, d_ff, d_model), (E, d_model, d_ff)))
    s_in, s_out = (None if kept == dtype else torch.empty(w.shape[:-1], device=meta) for w in (w_in, w_out))
    x, weights = torch.empty(tokens, d_model, dtype=dtype, device=meta), torch.empty(tokens, K, device=meta)
    ids = torch.empty(tokens, K, dtype=torch.int64, device=meta)
    inference.forward(x, w_in, s_in, w_out, s_out, weights, ids, "swiglu", "triton", batch_invariant)


def _record_paged(n_heads: int, n_kv_heads: int, width: int, dtype: torch.dtype, kept: torch.dtype) -> None:
    """Attention of 64 requests, 16 positions a block."""
    q = torch.empty(64, n_heads, width, dtype=dtype, device="meta")
    k = torch.empty(1 << 20, n_kv_heads, width, dtype=kept, device="meta")
    scale = None if kept == dtype else torch.empty(k.shape[:2], device="meta")
    tables = (torch.empty(shape, dtype=torch.int32, device="meta") for shape in ((64, 2048), (65,), (64,)))
    triton_paged.paged_attention(q, k, k, *tables, 16, 1, 32768, scale, scale)


def _contiguous(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    return triton_pointer.Experts(empty(E, G, F, D), empty(E, D, F))


def _strided(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    """Transposed matrices, [E, D, G*F] and [E, F, D]: these go through the pointers everywhere."""
    return triton_pointer.Experts(
        empty(E, D, G * F).transpose(1, 2).unflatten(1, (G, F)), empty(E, F, D).transpose(1, 2)
    )


def _pairs(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    """Gate and up in turns, each contiguous."""
    return triton_pointer.Experts(empty(E, F, G, D).transpose(1, 2), empty(E, D, F))


def _interleaved(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    """gpt-oss: transposed, gate and up in turns, biases."""
    w_in = empty(E, D, F * G).unflatten(2, (F, G)).permute(0, 3, 2, 1)
    return triton_pointer.Experts(w_in, empty(E, F, D).transpose(1, 2), empty(E, G, F), empty(E, D))


# --------------------------------------------------------------------------------------------------------- compiling


def compile_launch(launch: Launch, arch: str) -> Report:
    """Compile for `arch`; a failure is a report with a `problem`.

    As the JIT would word it, so that a launch finds the kernel in Triton's cache.
    """
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={
            (position,): [["tt.divisibility", 16]] if position in launch.divisible else []
            for position, (_, kind) in enumerate(launch.signature)
            if not (kind.startswith("tensordesc") or launch.kernel.params[position].do_not_specialize)
        },
    )
    try:
        made = triton.compile(
            source,
            target=TARGETS[arch],
            options={"num_warps": launch.warps, "num_stages": launch.stages, **dict(launch.options)},
        )
    except Exception as error:
        return Report(launch, problem=f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    report = Report(launch, shared=made.metadata.shared)
    if arch.startswith("gfx"):
        assembly = made.asm["amdgcn"]
        report.registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        report.spills = _number(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        report.mma = assembly.count("v_mfma")
    else:
        usage, code = sass.disassembled(made.asm["cubin"])
        report.registers = _number(r"REG:(\d+)", usage)
        report.spills = len(re.findall(r"\bSTL\b", code))
        ptx = made.asm["ptx"]
        report.wgmma = ptx.count("wgmma.mma_async") + ptx.count("tcgen05.mma.")
        report.mma = ptx.count("mma.sync")
        if launch.is_product:
            report.loop = sass.main_loop(code)
    report.problem = _problem(report, arch)
    return report


def _problem(report: Report, arch: str) -> str:
    """Which limit a kernel breaks, if any."""
    if report.shared > CARDS[arch].shared:
        return f"{report.shared:,} B of shared memory, {CARDS[arch].shared:,} at most"
    if arch.startswith("gfx") and report.launch.is_product:
        return f"{report.spills} spills" if report.spills else ""
    if not report.launch.is_product:
        # In a kernel that goes over its data once, a few registers do not matter.
        return f"{report.spills} spills" if report.spills > 4 else ""
    loop = report.loop
    if not loop.products:
        return "no main loop found"
    if loop.spills:
        return f"{loop.spills} spills in the main loop"
    # At the end of a tile 32 registers of 256 threads, out and in, are 64 kB: 1% of what its loop reads at width 8192.
    if report.spills * report.launch.warps > 32 * 8:
        return f"{report.spills} spills"
    constants = dict(report.launch.constants)
    half = any("bf16" in kind or "fp16" in kind for _, kind in report.launch.signature)
    # A warp group's instruction takes 64 rows; smaller tiles use the warps' own.
    large = min(constants.get("BM", 64), constants.get("BN", 64)) >= 64
    if half and arch in ("sm_90", "sm_100") and large and not report.wgmma:
        return "no instruction of a warp group"
    # One row has no use for tensor cores.
    if half and constants.get("BM") != 1 and not report.wgmma + report.mma:
        return "no tensor-core instruction"
    # Every operand recorded here is contiguous along one dimension; what is gathered has an index of 4 bytes besides.
    four = constants.get("GATHER_A") or constants.get("GATHER_B") or _turns(constants, arch)
    if narrow := {width for width in loop.loads if width < 16} - ({4} if four else set()):
        return f"the main loop reads {min(narrow)} bytes at a time"
    return ""


def _turns(constants: dict[str, Any], arch: str) -> bool:
    """Whether an operand is turned round on its way into shared memory, a number at a time.

    Tensor cores that read shared memory read 32-bit operands only along the summed dimension. In `down_backward` and
    `dx` the weights lie across it, in dw both operands do. A warp still reads whole lines of memory, with four times
    the instructions: 64 at a step of a 64 x 64 x 32 tile, beside 128 clocks of tensor cores. So it is left as it is.
    """
    return arch in ("sm_90", "sm_100") and constants.get("PRECISION") == "tf32" and not constants.get("K_FIRST")


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def compiler() -> Callable[[str, int], tuple[str, bool]]:
    """For the processes that compile: a launch's line of the table, by its number, and whether it breaks a limit."""
    recorded = cache(launches)

    def line(arch: str, number: int) -> tuple[str, bool]:
        report = compile_launch(recorded(arch)[number], arch)
        return report.row(arch), bool(report.problem)

    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--once", action="store_true", help="each kernel once, as training in bfloat16 launches it")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    print(f"triton {triton.__version__}")
    started, problems = time.perf_counter(), 0
    names = {arch: [launch.name for launch in launches(arch)] for arch in arguments.arch}
    jobs = [
        (arch, n)
        for arch, found in names.items()
        for n, name in enumerate(found)
        if arguments.only in name and not (arguments.once and name in found[:n])
    ]
    alone = arguments.jobs == 1
    results = starmap(compiler(), jobs) if alone else side_by_side(compiler, (), jobs, arguments.jobs)
    above = ""
    for (arch, number), result in zip(jobs, results, strict=True):
        if arch != above:
            print(f"\n{arch:28} {'tile':15} warps stages regs spills loop   shared    about blocks loads wgmma  mma")
            above = arch
        line, problem = (f"{names[arch][number]:28} {result}", True) if isinstance(result, RuntimeError) else result
        problems += problem
        print(line, flush=True)
    print(f"\n{len(jobs)} kernels in {time.perf_counter() - started:.0f} s")
    print(f"\n{problems} problem{'s' * (problems != 1)}" if problems else "\nall within the limits")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
