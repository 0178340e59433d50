"""Compile every kernel and shipped tile configuration for GPUs this machine need not have, and say what came out.

The launches are recorded from the host code itself, on tensors without storage, so what is compiled is what would run:
same arguments, same specialisation. Printed per kernel: registers, spills, shared memory, tensor-core instructions.

Run: python -m moe.kernels.ahead [--arch sm_80 sm_90 gfx942] [--only NAME]. Exit code 1 when a limit is broken.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from moe.kernels import tiles
from moe.kernels.experts import triton_gluon, triton_mlp, triton_pointer, triton_routes, triton_rows, triton_tma
from moe.kernels.gate import triton_gate
from moe.kernels.loss import triton_chunked

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}  # bytes a block; the compiler does not check
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "gfx942": 304}
MODULES = (triton_gate, triton_routes, triton_rows, triton_pointer, triton_tma, triton_gluon, triton_chunked)
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
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

    @property
    def name(self) -> str:
        module = self.kernel.fn.__module__.rpartition(".")[2].removeprefix("triton_")
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
    registers: int
    spills: int
    shared: int
    wgmma: int
    mma: int
    problem: str = ""


# --------------------------------------------------------------------------------------------------------- recording


class _Recorder:
    """Stands in for a kernel: keeps the launches, runs nothing."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append(_launch(self.kernel, args, kwargs))


def _launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    warps, stages = kwargs.pop("num_warps", 4), kwargs.pop("num_stages", 3)
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, divisible = [], [], []
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        kind = "constexpr" if name in constexprs else _kind(value)
        if kind == "constexpr":
            constants.append((name, value))
        elif kind.startswith("*") or (kind in ("i32", "i64") and value % 16 == 0):
            divisible.append(position)
        signature.append((name, kind))
    return Launch(kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages)


def _kind(value: Any) -> str:
    """The type by which Triton specialises a runtime argument."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}[{','.join(map(str, value.block_shape))}]>"
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
        patch.object(tiles, "architecture", lambda device: arch),
        patch.object(tiles, "tuned", lambda: {}),
        patch.object(tiles, "_multiprocessors", lambda device: MULTIPROCESSORS[arch]),
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
        _record(8192, 2880, 2880, torch.bfloat16, "swiglu_oai", _interleaved)
        if arch == "sm_90":
            with patch.object(tiles, "GLUON", True):
                _record(8192, 10752, 28672, torch.bfloat16, "swiglu", _contiguous)
        logits = torch.empty(8192, 16, device="meta")
        for bias in (None, logits[0]):
            weights, ids, _ = triton_gate.gate(logits, 2, bias)
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


def _record(tokens: int, d_model: int, d_ff: int, dtype: torch.dtype, activation: str, layout: Layout) -> None:
    E, K = 16, 2

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(tokens, d_model)
    weights, ids = empty(tokens, K, dtype=torch.float32), empty(tokens, K, dtype=torch.int64)
    experts = layout(empty, E, 1 if activation == "gelu" else 2, d_ff, d_model)
    _, h, *routes = triton_mlp.forward(x, experts, weights, ids, activation, True)
    triton_mlp.backward(x, x, experts, weights, h, *routes, activation)
    triton_mlp.backward(x, x, experts, weights, h[:0], *routes, activation)
    triton_mlp.forward(x, experts, weights, ids, activation, False)


def _contiguous(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    return triton_pointer.Experts(empty(E, G, F, D), empty(E, D, F))


def _strided(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    """Transposed matrices, [E, D, G*F] and [E, F, D]: these go through the pointers everywhere."""
    return triton_pointer.Experts(
        empty(E, D, G * F).transpose(1, 2).unflatten(1, (G, F)), empty(E, F, D).transpose(1, 2)
    )


def _interleaved(empty: Empty, E: int, G: int, F: int, D: int) -> triton_pointer.Experts:
    """gpt-oss: transposed, gate and up in turns, biases."""
    w_in = empty(E, D, F * G).unflatten(2, (F, G)).permute(0, 3, 2, 1)
    return triton_pointer.Experts(w_in, empty(E, F, D).transpose(1, 2), empty(E, G, F), empty(E, D))


# --------------------------------------------------------------------------------------------------------- compiling


def compile_launch(launch: Launch, arch: str) -> Report:
    """Compile for `arch`; a failure is a report with a `problem`."""
    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in launch.divisible},
    )
    try:
        made = triton.compile(
            source, target=TARGETS[arch], options={"num_warps": launch.warps, "num_stages": launch.stages}
        )
    except Exception as error:
        return Report(launch, 0, 0, 0, 0, 0, f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    shared = made.metadata.shared
    if arch.startswith("gfx"):
        assembly = made.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", assembly)
        report = Report(
            launch, registers, _number(r"\.vgpr_spill_count:\s+(\d+)", assembly), shared, 0, assembly.count("v_mfma")
        )
    else:
        registers, spills = _resources(made.asm["cubin"])
        ptx = made.asm["ptx"]
        report = Report(launch, registers, spills, shared, ptx.count("wgmma.mma_async"), ptx.count("mma.sync"))
    report.problem = _problem(report, arch)
    return report


def _problem(report: Report, arch: str) -> str:
    """Which limit a kernel breaks, if any."""
    if report.shared > SHARED_LIMIT[arch]:
        return f"{report.shared:,} B of shared memory, {SHARED_LIMIT[arch]:,} at most"
    if arch.startswith("gfx"):
        return ""
    # A product's loop must not spill; in a kernel that goes over its data once, a few registers do not matter.
    if report.spills > (0 if report.launch.is_product else 4):
        return f"{report.spills} spills"
    if not report.launch.is_product:
        return ""
    constants = dict(report.launch.constants)
    half = any("bf16" in kind or "fp16" in kind for _, kind in report.launch.signature)
    # A warp group's instruction takes 64 rows; smaller tiles use the warps' own.
    large = min(constants.get("BM", 64), constants.get("BN", 64)) >= 64
    if half and arch == "sm_90" and large and not report.wgmma:
        return "no wgmma"
    if half and not report.wgmma + report.mma:
        return "no tensor-core instruction"
    return ""


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and stores to local memory, of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), len(re.findall(r"\bSTL\b", code))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    print(f"triton {triton.__version__}")
    problems = 0
    for arch in arguments.arch:
        print(f"\n{arch:28} {'tile':15} warps stages regs spills   shared wgmma  mma")
        for launch in launches(arch):
            if arguments.only not in launch.name:
                continue
            report = compile_launch(launch, arch)
            problems += bool(report.problem)
            print(
                f"{launch.name:28} {launch.tile:15} {launch.warps:5} {launch.stages:6} {report.registers:4} "
                f"{report.spills:6} {report.shared:8,} {report.wgmma:5} {report.mma:4}  {report.problem}",
                flush=True,
            )
    print(f"\n{problems} problem{'s' * (problems != 1)}" if problems else "\nall within the limits")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
