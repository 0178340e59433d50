"""What a compiled NVIDIA kernel does in its main loop, read from its machine code (`nvdisasm -c`).

The main loop is the shortest way round through the kernel's multiply-adds, the densest of them: what runs at every
step. A loop over tiles around it is longer; so is the way through the end of a tile, within the same loop.
"""

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+ +)?(?P<name>[A-Z][\w.]*)(?P<rest>[^;]*);")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_TENSOR_CORE = re.compile(r"(UTC)?[A-Z]G?MMA\b")


def disassembled(cubin: bytes) -> tuple[str, str]:
    """What a compiled kernel uses, and its machine code."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    return usage, code


@dataclass
class Loop:
    """The main loop of a kernel: all counts are of instructions of one thread, at one step."""

    instructions: int = 0
    products: int = 0  # tensor-core instructions; multiply-adds of plain units where there are none
    spills: int = 0  # to and from local memory
    loads: Counter[int] = field(default_factory=Counter)  # from global memory, by their width in bytes


@dataclass
class _Block:
    names: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # the blocks that may follow


def main_loop(code: str) -> Loop:
    """The main loop of a kernel's disassembly; all zeros where no loop multiplies."""
    blocks = _blocks(code)
    for counts in (_tensor_core, _multiply_add):
        ways = [_way_round(blocks, i) for i, b in enumerate(blocks) if any(map(counts, b.names))]
        found = [[name for i in way for name in blocks[i].names] for way in ways if way]
        if found:
            names = max(found, key=lambda names: sum(map(counts, names)) / len(names))
            return Loop(
                len(names),
                sum(map(counts, names)),
                sum(name.split(".")[0] in ("STL", "LDL") for name in names),
                Counter(w for name in names if (w := load_width(name))),
            )
    return Loop()


def load_width(name: str) -> int:
    """Bytes that an instruction reads of global memory for one thread; 0 where it does not."""
    operation, *parts = name.split(".")
    if operation not in ("LDG", "LDGSTS"):
        return 0
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in parts if part in widths), 4)


def _tensor_core(name: str) -> bool:
    return bool(_TENSOR_CORE.match(name))


def _multiply_add(name: str) -> bool:
    return name.split(".")[0] in ("FFMA", "FFMA2")


def _blocks(code: str) -> list[_Block]:
    """The basic blocks, in order, and what may follow each."""
    blocks, labels, targets = [_Block()], {}, {}
    syncs: dict[str, set[str]] = {}  # barrier -> where threads that wait for each other go on
    for line in code.splitlines():
        if found := _LABEL.match(line):
            if blocks[-1].names:
                blocks[-1].after.append(len(blocks))
                blocks.append(_Block())
            labels[found.group(1)] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            name, rest = found["name"], found["rest"]
            operation = name.split(".")[0]
            blocks[-1].names.append(name)
            if operation == "BSSY":
                syncs.setdefault(rest.split(",")[0].strip(), set()).update(_TARGET.findall(rest))
            if operation not in ("BRA", "EXIT", "RET", "BSYNC"):
                continue
            here = targets.setdefault(len(blocks) - 1, set())
            here.update(_TARGET.findall(rest) if operation == "BRA" else ())
            if operation == "BSYNC":
                here.update(syncs.get(rest.strip(), ()))
            # A condition stands before the instruction, or, in a branch, before its target.
            if found["guard"] or operation == "BSYNC" or rest.split("`")[0].strip():
                blocks[-1].after.append(len(blocks))
            blocks.append(_Block())
    for block, names in targets.items():
        blocks[block].after += [labels[name] for name in names if name in labels]
    for block in blocks:
        block.after = [i for i in block.after if i < len(blocks)]
    return blocks


def _way_round(blocks: list[_Block], start: int) -> list[int]:
    """The blocks of the shortest way, in instructions, from a block back to itself; empty where there is none."""
    before: dict[int, int] = {}
    reached: set[int] = set()
    queue = [(len(blocks[i].names), i, start) for i in blocks[start].after]
    heapq.heapify(queue)
    while queue:
        length, block, origin = heapq.heappop(queue)
        if block in reached:
            continue
        reached.add(block)
        before[block] = origin
        if block == start:
            way = [start]
            while (origin := before[way[-1]]) != start:
                way.append(origin)
            return way[::-1]
        for i in blocks[block].after:
            heapq.heappush(queue, (length + len(blocks[i].names), i, block))
    return []
