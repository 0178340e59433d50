"""Names that other libraries do not promise: which of them we use, and that each is there in the versions tested.

A new use needs a line here, with what becomes of it where the name is gone. `make matrix` tries torch 2.11 and 2.13,
with their Tritons; those of transformers are asked for by tests/hf/test_experts.py.
"""

import ast
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _pytree, checkpoint

from moe.errors import TraceError
from moe.profile import override

ROOT = Path(__file__).parent.parent

# (what has it, its name) -> where it is used. Missing ones end in an AttributeError, unless the line says otherwise.
USED: dict[tuple[Any, str], str] = {
    (torch, "_C._current_graph_task_id"): "profile: inside a backward?",
    (torch, "_C._distributed_c10d.HashStore"): "parallel: a process group of one, which has nobody to tell",
    (os, "_exit"): "parallel: a rank whose launcher is gone ends at once, whatever its threads do",
    (torch, "_C._functorch.is_batchedtensor"): "profile: inside torch.func.vmap?",
    (torch, "_C._functorch.is_functorch_wrapped_tensor"): "kernels: may values be looked at?",
    (torch, "_C._are_functorch_transforms_active"): "kernels: does torch.func differentiate?",
    (torch, "_C._len_torch_dispatch_stack"): "kernels: does anybody watch the ops?",
    (forward_ad, "_current_level"): "kernels: does forward-mode differentiate?",
    (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"): "serve: has the CPU units for bfloat16?",
    (torch.ops.aten, "_assert_async.msg"): "kernels: ids out of range, on a GPU",
    (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu.default"): "recompute: else computed again",
    (torch.ops.aten, "_scaled_dot_product_flash_attention.default"): "recompute: else computed again",
    (torch.ops.aten, "_scaled_dot_product_efficient_attention.default"): "recompute: else computed again",
    (torch.ops.aten, "_scaled_dot_product_cudnn_attention.default"): "recompute: else computed again",
    (checkpoint, "_checkpoint_without_reentrant_generator"): "profile: else a replay says which torch it needs",
    (_pytree, "_register_namedtuple"): "model: exported programs that are saved",
    (nn.modules.module, "_global_forward_pre_hooks"): "layers: is a module exactly ours?",
    (nn.modules.module, "_global_forward_hooks"): "layers: is a module exactly ours?",
    (nn.modules.module, "_global_backward_pre_hooks"): "layers: is a module exactly ours?",
    (nn.modules.module, "_global_backward_hooks"): "layers: is a module exactly ours?",
    (nn.Linear(1, 1), "_parameters"): "layers, weights: which tensors a module has",
    (nn.Linear(1, 1), "_buffers"): "layers: which tensors a module has",
    (nn.Linear(1, 1), "_forward_hooks"): "layers, profile: who watches a module",
    (nn.Linear(1, 1), "_forward_pre_hooks"): "layers, profile: who watches a module",
    (nn.Linear(1, 1), "_backward_hooks"): "layers, profile: who watches a module",
    (nn.Linear(1, 1), "_backward_pre_hooks"): "layers, profile: who watches a module",
    (nn.Linear(1, 1), "_apply"): "model, experts: weights that move or change their dtype",
    (nn.Linear(1, 1), "_load_from_state_dict"): "model, experts: weights that are loaded",
    (torch.compile(nn.Linear(1, 1)), "_orig_mod"): "checkpoint, profile: the module inside; else taken as it is",
    (triton, "tools.ragged_tma.create_ragged_descriptor"): "kernels: rows up to the end of an expert, on Hopper",
    (triton, "tools.tensor_descriptor.TensorDescriptor"): "kernels: tensor maps",
    (triton, "runtime.interpreter._patch_lang_tensor"): "kernels: scalars as indices, before Triton 3.9",
    (triton, "compiler.ASTSource"): "kernels: compilation ahead of time",
    (triton, "backends.compiler.GPUTarget"): "kernels: compilation ahead of time",
    (triton, "experimental.gluon._runtime.GluonASTSource"): "kernels: the same, of Gluon",
}
# Of transformers' modules (tests/hf/test_experts.py), of tyro's (moe/cli/usage.py: a test of it fails), and named
# tuples' own, which Python promises.
OTHERS = {"_is_expert_parallel", "_apply_gate", "_default_apply_gate", "_subcommands", "_errors"}
PROMISED = {"_asdict", "_replace"}


@pytest.mark.parametrize(("owner", "name"), USED, ids=[name for _, name in USED])
def test_it_is_there(owner: Any, name: str) -> None:
    if owner is triton:
        __import__(f"triton.{name.rpartition('.')[0]}")
    attrgetter(name)(owner)


def test_a_replay_without_its_name_says_which_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(checkpoint, "_checkpoint_without_reentrant_generator")
    with pytest.raises(TraceError, match=r"replayed with torch .* that of 2.11 to 2.13"), override._remembering():
        pass


def test_no_other_is_used() -> None:
    files = [path for top in ("moe", "kernels") for path in (ROOT / top).rglob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    ours = {n.name for _, n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    ours |= {n.attr for _, n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    ours |= {n.id for _, n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    known = {part for _, name in USED for part in name.split(".")} | OTHERS | PROMISED | {"_pytree"}
    found = set()
    for path, node in nodes:
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            names = [n.value for n in node.args[1:2] if isinstance(n, ast.Constant)]
        else:
            continue
        private = {n for n in names if isinstance(n, str) and n.startswith("_") and not n.startswith("__")}
        found |= {(str(path.relative_to(ROOT)), n) for n in private - known - ours}
    assert not found
