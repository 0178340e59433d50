"""What holds for every file of the package: read from its syntax trees, and from the packages as they import."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import MODULES, ROOT

TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
PACKAGES = sorted(name for name, path in MODULES.items() if path.name == "__init__.py")
# What is called by name, and by others: torch, its checkpoints, and lm-eval; and what users call, who have a run over
# processes: no command here has one yet.
CALLED_BY_OTHERS = {"reset_parameters", "extra_repr", "loglikelihood_rolling", "generate_until", "lookup_object"}
CALLED_BY_OTHERS |= {"prepare_local_plan", "prepare_global_plan", "write_data", "finish", "divide"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Functions, classes and their methods, with dotted names; not what is inside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from definitions(child, prefix)


def is_public(dotted: str) -> bool:
    return all(not part.startswith("_") or part in ("__init__", "__call__") for part in dotted.split("."))


def unannotated(dotted: str, node: Function) -> list[str]:
    """The parameters, and "return", that have no annotation."""
    of_class = "." in dotted and "staticmethod" not in (ast.unparse(d) for d in node.decorator_list)
    positional = [*node.args.posonlyargs, *node.args.args][of_class:]
    every = [*positional, *node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    return [a.arg for a in every if a.annotation is None] + ["return"] * (node.returns is None)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_functions_are_annotated(name: str) -> None:
    """All but Triton's kernels: what their parameters are is known when they are launched."""
    missing = {
        dotted: bare
        for dotted, node in definitions(TREES[name])
        if isinstance(node, Function) and is_public(dotted)
        if not any(ast.unparse(d).startswith(("triton.jit", "gluon.jit")) for d in node.decorator_list)
        if (bare := unannotated(dotted, node))
    }
    assert missing == {}


def test_nothing_is_there_for_the_tests_alone() -> None:
    """Every function, class and method is used by name: in the package, its facades, a benchmark or an example."""
    used = set(CALLED_BY_OTHERS)
    scripts = [
        ast.parse(p.read_text(encoding="utf-8")) for d in ("benchmarks", "examples") for p in (ROOT / d).rglob("*.py")
    ]
    for tree in [*TREES.values(), *scripts]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)  # of __all__, and of getattr
    unused = [
        f"{name}.{dotted}"
        for name, tree in TREES.items()
        for dotted, node in definitions(tree)
        if node.name not in used and not node.name.startswith("__") and not registered(node)
    ]
    assert unused == [], "delete them, or move them to the tests"


def registered(node: Function | ast.ClassDef) -> bool:
    """Whether a decorator hands the function to someone who calls it: a command, an op's fake."""
    return any(re.search(r"command|register_fake|register_vmap", ast.unparse(d)) for d in node.decorator_list)


@pytest.mark.parametrize("name", PACKAGES)
def test_no_name_hides_a_submodule(name: str) -> None:
    """`import moe.plan.fit` and `moe.plan.fit` are one thing: no function has the name of its package's module."""
    package = importlib.import_module(name)
    for module in MODULES.keys() - {"moe.__main__"}:  # which runs a command when it is imported
        parent, _, last = module.rpartition(".")
        if parent == name:
            assert importlib.import_module(module) is getattr(package, last), f"{name}.{last} is two things"


def test_type_checkers_see_the_names_of_the_facade() -> None:
    import moe

    block = next(n for n in TREES["moe"].body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    bound = {a.asname or a.name for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    bound |= {node.name for node in block.body if isinstance(node, ast.ClassDef)}
    assert bound == set(moe.__all__)


def test_the_top_of_the_package_is_short() -> None:
    files = sorted(path.name for path in Path(ROOT / "moe").glob("*.py"))
    assert len(files) <= 16, f"put new files into a folder: {', '.join(files)}"
