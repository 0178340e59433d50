"""What others do with a model: its Output as a tree, export, tensors without values, torch.func, data parallelism.

B batch, S sequence.
"""

import io
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from moe.model import Transformer
from tests.conftest import rel, tiny_config


def tokens(B: int = 3, S: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(seed))


def test_an_output_goes_through_a_tree_and_back():
    model = Transformer(tiny_config())
    out = model(tokens(), tokens(seed=1), mask_BS=torch.ones(3, 7, dtype=torch.int64))
    leaves, tree = pytree.tree_flatten(out)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 3 + 3 + 4 * len(out.routing)
    again = pytree.tree_unflatten(leaves, tree)
    assert torch.equal(again.loss, out.loss)
    assert torch.equal(again.routing[1].counts_E, out.routing[1].counts_E)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_targets", [False, True])
def test_an_export_takes_any_batch_and_length_and_survives_a_file(with_targets, strict):
    model, other = Transformer(tiny_config()), tokens(5, 11, seed=2)
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("S", max=40)}
    names = ["tokens_BS", "targets_BS"][: 1 + with_targets]
    program = torch.export.export(
        model, (tokens(),) * len(names), dynamic_shapes=dict.fromkeys(names, sizes), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    got = torch.export.load(file).module()(*(other,) * len(names))
    want: Any = model(*(other,) * len(names))
    assert rel(*((got.loss, want.loss) if with_targets else (got.logits_BSV, want.logits_BSV))) < 1e-6
    assert rel(got.losses["balance"], want.losses["balance"]) < 1e-6
    assert torch.equal(got.routing[0].counts_E, want.routing[0].counts_E)


def test_an_export_takes_documents_and_a_mask():
    model = Transformer(tiny_config())
    sizes = {0: torch.export.Dim("B"), 1: torch.export.Dim("S", max=40)}
    given = {"documents_BS": torch.zeros(3, 7, dtype=torch.int64), "mask_BS": torch.ones(3, 7, dtype=torch.bool)}
    shapes = dict.fromkeys(["tokens_BS", *given], sizes)
    program = torch.export.export(model, (tokens(),), given, dynamic_shapes=shapes)
    given: dict[str, Any] = {"documents_BS": torch.arange(11).expand(5, -1) // 4, "mask_BS": torch.rand(5, 11) < 0.7}
    other = tokens(5, 11, seed=2)
    got, want = program.module()(other, **given).logits_BSV, model(other, **given).logits_BSV
    assert rel(got[given["mask_BS"]], want[given["mask_BS"]]) < 1e-6


class Traced(torch.nn.Module):
    """Logits alone: torch.jit knows no Output."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, documents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(x, documents_BS=documents, mask_BS=mask).logits_BSV


@pytest.mark.parametrize(
    "trace", [lambda f, *x: torch.jit.trace(f, x, check_trace=False), lambda f, *x: make_fx(f)(*x)]
)
def test_a_trace_keeps_no_documents_and_no_mask(trace):
    model = Traced(Transformer(tiny_config()))
    traced = trace(model, tokens(), torch.zeros(3, 7, dtype=torch.int64), torch.ones(3, 7, dtype=torch.bool))
    other = tokens(seed=2), torch.arange(7).expand(3, -1) // 3, torch.tensor([0, 1, 1, 0, 1, 1, 1]).expand(3, -1) > 0
    assert rel(traced(*other)[other[2]], model(*other)[other[2]]) < 1e-6


@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_go_through(kind, with_documents):
    def shapes(model: Transformer, x: torch.Tensor) -> None:
        documents = torch.zeros_like(x) if with_documents else None
        out = model(x, x, documents_BS=documents, mask_BS=torch.ones_like(x))
        assert out.loss is not None
        assert out.loss.shape == ()
        assert model(x).logits_BSV.shape == (3, 7, 61)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())

    if kind == "meta":
        with torch.device("meta"):
            shapes(Transformer(tiny_config()), tokens().to("meta"))
    else:
        with FakeTensorMode():
            shapes(Transformer(tiny_config()), torch.zeros(3, 7, dtype=torch.int64))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_gradients_by_torch_func_are_those_of_backward(mode):
    model, x = Transformer(tiny_config()).double(), tokens()
    model.activation_checkpointing = mode
    weights = {name: p.detach() for name, p in model.named_parameters()}
    model(x, x).loss.backward()
    got = grad(lambda w: functional_call(model, w, (x, x)).loss)(weights)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert rel(got[name], p.grad) < 1e-12


def test_directional_and_second_derivatives_by_torch_func():
    model, x = Transformer(tiny_config()).double(), tokens()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in weights.items()}

    def loss(w: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, w, (x, x)).loss

    def dot(g: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(g[name] * v).sum() for name, v in along.items()]).sum()

    assert rel(jvp(loss, (weights,), (along,))[1], dot(grad(loss)(weights))) < 1e-12
    forward = jvp(grad(loss), (weights,), (along,))[1]
    backward = grad(lambda w: dot(grad(loss)(w)))(weights)
    for name, product in forward.items():
        assert rel(backward[name], product) < 1e-11, name


def test_sequences_under_vmap_are_those_of_a_batch():
    model, x = Transformer(tiny_config()).double(), tokens()
    got = vmap(lambda x_S: model(x_S[None]).logits_BSV[0])(x)
    assert rel(got, model(x).logits_BSV) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float64_under_autocast_stays_float64(dtype):
    model, x = Transformer(tiny_config()).double(), tokens()
    want = model(x, x)
    with torch.autocast("cpu", dtype=dtype):
        got = model(x, x)
        got.loss.backward()
    assert got.loss.dtype == torch.float64
    assert rel(got.loss, want.loss) < 1e-12


def _steps(rank: int, port: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = Transformer(tiny_config()).double()
    whole = DistributedDataParallel(model, static_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        x = tokens(seed=2 * step + rank)
        whole(x, x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), Path(place, str(rank)))
    dist.destroy_process_group()


def test_ranks_of_a_static_graph_stay_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(  # type: ignore[attr-defined]
        _steps, (port, str(tmp_path)), nprocs=2
    )
    model = Transformer(tiny_config()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        for rank in range(2):
            (model(*[tokens(seed=2 * step + rank)] * 2).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for name, value in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert rel(ranks[0][name], value) < 1e-12
