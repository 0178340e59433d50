"""The import direction of the package, read from its syntax trees, and what the core needs to be installed."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those of its own rank (without a cycle) and of lower ones. The longest prefix that fits counts.
RANK = {
    "moe.errors": 0,
    "moe.config": 0,
    "moe.plan": 1,
    "moe.io.toml": 0,
    "moe.io": 2,
    "moe.kernels": 2,
    "moe.plan.pictures": 3,
    "moe.weights": 2,
    "moe.layers": 3,
    "moe.experts": 3,
    "moe.recompute": 3,
    "moe.vision": 4,
    "moe.model": 5,
    "moe.tokenizer": 5,
    "moe.serve": 6,
    "moe.generate": 7,
    "moe.checkpoint": 7,
    "moe.hf": 7,
    "moe.lora": 7,
    "moe.data": 7,
    "moe.device": 2,
    "moe.parallel": 7,
    "moe.chat": 8,
    "moe.profile": 8,
    "moe.evaluate": 8,
    "moe.train": 9,
    "moe.serve.trace": 9,
    "moe.serve.roofline": 9,
    "moe.serve.bench": 9,
    "moe.serve.pictures": 9,
    "moe.lm_eval": 9,
    "moe.ladder": 10,
    "moe.cli": 11,
    "moe.__main__": 12,
}
MODEL_RANK = RANK["moe.model"]
# What these may import, besides the standard library and themselves.
ONLY = {
    "moe.errors": set(),
    "moe.io.toml": {"moe.errors"},
    "moe.config": {"moe.errors", "moe.io.toml"},
    "moe.io": {"moe.errors", "moe.config", "torch", "numpy", "safetensors", "matplotlib"},
    "moe.io.files": {"moe.errors"},
    "moe.io.page": set(),
    "moe.kernels": {"torch", "triton"},
    "moe.plan": {"moe.config", "moe.errors", "moe.io.toml"},
    "moe.plan.pictures": {"moe.config", "moe.errors", "moe.plan", "moe.io.figures", "moe.io.page", "matplotlib"},
    "moe.serve.request": {"moe.errors"},
    "moe.serve.blocks": {"moe.errors"},
    "moe.serve.scheduler": {"moe.errors", "moe.serve.blocks", "moe.serve.request"},
}
# Packages that hold constants and import nothing: every module may read them.
FACTS = {"moe.kernels.loss"}
# What a module may take from the facade `moe`, which lies above them all.
FACADE_NAMES = {"__version__"}


def modules() -> dict[str, Path]:
    """Every module of the package: dotted name -> file. moe/kernels is a link, so kernels/ is walked."""
    found = {}
    for path in [*ROOT.glob("moe/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        relative = path.relative_to(ROOT)
        parts = relative.with_suffix("").parts
        if parts[0] == "kernels":
            parts = ("moe", *parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(name: str, path: Path, source: str | None = None) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of each import, those within functions too; `from a import b` is a.b if that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = full.startswith("moe.")
                if node.module == "moe" and alias.name in FACADE_NAMES:
                    continue
                yield (full if not ours or full in RANK or full in MODULES else f"{node.module}"), node.lineno


def longest_prefix(name: str, table: dict) -> str | None:
    fits = [key for key in table if name == key or name.startswith(key + ".")]
    return max(fits, key=len, default=None)


def violations(name: str, path: Path, source: str | None = None) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    home, found = longest_prefix(name, RANK), []
    if home is None:
        return [f"{path}: {name} has no rank; add it to RANK, where the design puts it"]
    only = longest_prefix(name, ONLY)
    for target, line in imported(name, path, source):
        where = f"{path.relative_to(ROOT)}:{line}: {name} imports {target}"
        if target in FACTS:
            continue
        top = target.partition(".")[0]
        if top == "moe":
            target_home = longest_prefix(target, RANK)
            if target == "moe":
                found.append(f"{where}: the facade is for users; import the module that has it")
            elif target_home is None:
                found.append(f"{where}, which has no rank")
            elif RANK[target_home] > RANK[home]:
                found.append(f"{where}, which lies above it")
        if target.startswith("torch.distributed") and RANK[home] <= MODEL_RANK:
            found.append(f"{where}: parallelism is applied from outside")
        if only is not None and top not in sys.stdlib_module_names:
            allowed = {only, *ONLY[only]}
            if longest_prefix(target, dict.fromkeys(allowed)) is None:
                found.append(f"{where}; it may import only {', '.join(sorted(allowed))} and the standard library")
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_one_way(name: str) -> None:
    if name != "moe":  # the facade, which loads everything, lazily
        assert violations(name, MODULES[name]) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("moe.layers", "from moe import model", "lies above"),
        ("moe.layers", "from moe.model import Transformer", "lies above"),
        ("moe.layers", "def f():\n    import moe.cli", "lies above"),
        ("moe.layers", "from moe import load_config", "facade"),
        ("moe.config", "from moe.plan import params", "lies above"),
        ("moe.config", "import torch", "may import only"),
        ("moe.io.files", "import numpy", "may import only"),
        ("moe.io.tensorfiles", "from moe.plan import params", "may import only"),
        ("moe.io.figures", "from moe.kernels import ops", "may import only"),
        ("moe.plan.pictures", "import torch", "may import only"),
        ("moe.plan.counts", "from moe.plan.pictures import draw", "lies above"),
        ("moe.kernels.ops", "import einops", "may import only"),
        ("moe.kernels.ops", "from moe.config import Config", "may import only"),
        ("moe.plan.counts", "import torch.nn", "may import only"),
        ("moe.plan.counts", "from moe import kernels", "may import only"),
        ("moe.plan.counts", "from moe.kernels.loss import op", "may import only"),
        ("moe.model", "import torch.distributed as dist", "from outside"),
        ("moe.layers", "from torch import distributed", "from outside"),
        ("moe.model", "from torch.distributed.tensor import DTensor", "from outside"),
        ("moe.serve.scheduler", "import torch", "may import only"),
        ("moe.train.loop", "from moe.cli import main", "lies above"),
        ("moe.novelty", "", "no rank"),
    ],
)
def test_the_checks_see_what_they_should(name: str, source: str, complaint: str) -> None:
    found = violations(name, ROOT / "moe" / "example.py", source)
    assert any(complaint in line for line in found), found


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("moe.plan.counts", "import json\nfrom moe.config import Config\nfrom moe.plan import units"),
        ("moe.plan.counts", "from moe.kernels.loss import CHUNK_ELEMENTS"),
        ("moe.kernels.ops", "import triton.language as tl\nfrom moe.kernels import reference"),
        ("moe.parallel.mesh", "import torch.distributed\nfrom moe.model import Transformer"),
        ("moe.cli", "from moe import __version__\nfrom moe import train"),
    ],
)
def test_the_checks_let_pass_what_they_should(name: str, source: str) -> None:
    assert violations(name, ROOT / "moe" / "example.py", source) == []


@pytest.mark.parametrize("name", sorted(FACTS))
def test_facts_are_constants(name: str) -> None:
    body = ast.parse(MODULES[name].read_text(encoding="utf-8")).body
    assert all(isinstance(statement, ast.Expr | ast.Assign) for statement in body)


def test_no_imports_go_in_a_circle() -> None:
    graph = {name: {t for t, _ in imported(name, path)} & MODULES.keys() for name, path in MODULES.items()}
    del graph["moe"]
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done and name in graph:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


@pytest.mark.parametrize(
    "path", [str(p.relative_to(ROOT)) for p in sorted({*MODULES.values(), *ROOT.glob("tests/**/*.py")})]
)
def test_files_are_short_and_say_what_they_are_for(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.count("\n") <= 500, f"{path} is too long to read"
    assert ast.get_docstring(ast.parse(text)), f"{path} does not open with what it is for"


def test_core_imports_without_the_other_dependencies() -> None:
    """torch, triton, einops, safetensors and numpy are enough for the model; everything else declared is blocked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *(d for group in project["optional-dependencies"].values() for d in group)]
    names = {re.split(r"[\[<>=;~! ]", d)[0].replace("-", "_") for d in declared}
    core = {"torch", "triton", "einops", "safetensors", "numpy"}
    blocked = (names | {"matplotlib", "transformers"}) - core - {"gpt4_moe"}
    assert {"tyro", "rich", "tokenizers"} <= blocked
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(blocked)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import rich
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")
import moe
import torch
with torch.device("meta"):
    moe.Transformer(moe.load_config("gpt4-8k").scaled(d_model=192, n_layers=1))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_import_moe_is_light() -> None:
    code = "import sys, moe.plan; heavy = {'torch', 'numpy', 'rich'} & {*sys.modules}; assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_unknown_names_of_the_facade_are_attribute_errors() -> None:
    import moe

    assert not hasattr(moe, "transformer")
    assert moe.Transformer.__module__ == "moe.model"
    assert dir(moe) == sorted(moe.__all__)
    assert moe.kernels.ops.expert_mlp.__module__ == "moe.kernels.experts.op"
