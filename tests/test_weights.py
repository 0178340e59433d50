"""moe.weights: the promises of `init_weights`, under any sharding; what each parameter is."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig, TrainConfig
from moe.model import Transformer
from moe.train.optimizer import build
from moe.weights import generator_for, init_weights
from tests.conftest import ROOT, gradients, rel, tiny_config, tokens


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(tiny_config(tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())
    free = Transformer(tiny_config(tie_embeddings=False))
    free.load_state_dict({**model.state_dict(), "head.weight": model.embedding.weight})
    x, targets = tokens(), tokens(seed=1)
    assert torch.equal(model(x).logits_BSV, free(x).logits_BSV)
    tied, parts = gradients(model, model(x, targets).loss), gradients(free, free(x, targets).loss)
    assert rel(tied["embedding.weight"], parts["embedding.weight"] + parts["head.weight"]) < 1e-6


def test_same_seed_same_weights_and_no_two_parameters_alike() -> None:
    first, same, other = (dict(Transformer(tiny_config(), seed=s).named_parameters()) for s in (0, 0, 1))
    drawn = [name for name in first if not name.endswith("norm.weight")]
    for name in drawn:
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])
    values = {(first[name].flatten()[0] / first[name].std()).item() for name in drawn}
    assert len(values) == len(drawn), "two parameters drew from the same generator"


def test_weights_are_the_same_whatever_else_the_model_has() -> None:
    """Each parameter's values depend on the seed and its name, not on which were made before it."""
    short, tall = Transformer(tiny_config(n_layers=2)), Transformer(tiny_config(n_layers=3, vocab_size=7))
    for name in ("attention.wq.weight", "moe.router.weight", "moe.experts.w_in_EGFD"):
        assert torch.equal(short.get_parameter(f"blocks.1.{name}"), tall.get_parameter(f"blocks.1.{name}"))


@pytest.mark.parametrize("name", ["w_in_EGFD", "w_out_EDF"])
def test_experts_are_the_same_drawn_alone(name: str) -> None:
    """The sharding promise: whoever holds some experts draws what the whole model would have in their place."""
    cfg = tiny_config()
    whole_w = Transformer(cfg).get_parameter(f"blocks.0.moe.experts.{name}")
    std = 0.5 / whole_w.shape[-1] ** 0.5 / (1 if name == "w_in_EGFD" else (2 * cfg.n_layers) ** 0.5)
    for e in range(cfg.experts.n_experts):
        generator = generator_for(whole_w.device, 0, f"blocks.0.moe.{name}", e)
        assert torch.equal(whole_w[e], torch.empty_like(whole_w[e]).normal_(0.0, std, generator=generator))
        assert not any(torch.equal(whole_w[e], other) for other in whole_w[:e])


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from moe.model import Transformer
from moe.weights import init_weights
from tests.conftest import tiny_config

def check(how):
    cfg = tiny_config(tie_embeddings=how == "tied")
    want = dict(Transformer(cfg, seed=5).named_parameters())
    with torch.device("meta"):
        model = Transformer(cfg)
    if how == "experts":
        for block in model.blocks:
            for name, dim in (("w_in_EGFD", 2), ("w_out_EDF", 2)):
                meta = block.moe.experts.get_parameter(name)
                sharded = distribute_tensor(meta, mesh, [Shard(0), Shard(dim)], src_data_rank=None)
                setattr(block.moe.experts, name, torch.nn.Parameter(sharded))
    else:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["tp"])
        fully_shard(model, mesh=mesh["tp"])
    model.to_empty(device="cpu")
    init_weights(model, 5)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements"):
            place = parameter.device_mesh, parameter.placements
            kept = distribute_tensor(want[name].detach(), *place, src_data_rank=None)
            assert parameter.to_local().shape != want[name].shape or min(want[name].shape) == 1, (how, name)
            assert torch.equal(parameter.to_local(), kept.to_local()), (how, name)
        else:
            assert torch.equal(parameter, want[name]), (how, name)
    assert (model.head.weight is model.embedding.weight) == cfg.tie_embeddings
    print(how, sum(hasattr(p, "placements") for p in model.parameters()))

dist.init_process_group("fake", rank=int(sys.argv[1]), world_size=4, store=FakeStore())
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "tp"))
for how in ("experts", "fsdp", "tied"):
    check(how)
"""


@pytest.mark.parametrize("rank", [0, 3])
def test_shards_hold_what_the_whole_model_would(rank: int) -> None:
    """Of four ranks, without a message between them: experts over two and their width over two, and FSDP."""
    done = subprocess.run([sys.executable, "-c", SHARDED, str(rank)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards = dict(line.split() for line in done.stdout.splitlines())
    assert list(shards) == ["experts", "fsdp", "tied"]
    assert min(map(int, shards.values())) >= 4


def test_an_unknown_parameter_is_an_error_to_whoever_treats_kinds_apart() -> None:
    model = Transformer(tiny_config())
    model.blocks[0].attention.wq.bias = torch.nn.Parameter(torch.ones(40))  # type: ignore[union-attr]
    for act in (lambda: init_weights(model, 0), lambda: build(model, TrainConfig())):
        with pytest.raises(ValueError, match=r"blocks\.0\.attention\.wq\.bias is of no kind that is known"):
            act()


def test_initialised_again_ties_and_buffers_are_whole() -> None:
    cfg = tiny_config(tie_embeddings=True, router=RouterConfig(bias_update_rate=0.1))
    with torch.device("meta"):
        model = Transformer(cfg)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    init_weights(model, 0)
    assert model.head.weight is model.embedding.weight
    want = Transformer(cfg).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_built_on_meta_then_initialised_is_the_same() -> None:
    with torch.device("meta"):
        later = Transformer(tiny_config())
    later.to_empty(device="cpu")
    init_weights(later, seed=0)
    want = Transformer(tiny_config(), seed=0).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in later.state_dict().items())


def test_deeper_models_write_less_to_the_residual_stream() -> None:
    """wo and w_out shrink with 1 / sqrt(layers), so that the stream's variance stays put; nothing else does."""
    shallow, deep = (Transformer(tiny_config(d_model=96, n_layers=n)) for n in (2, 8))
    for name, ratio in {
        "attention.wo.weight": 2,
        "moe.experts.w_out_EDF": 2,
        "attention.wq.weight": 1,
        "moe.experts.w_in_EGFD": 1,
    }.items():
        stds = [m.get_parameter(f"blocks.0.{name}").std().item() for m in (shallow, deep)]
        assert stds[0] / stds[1] == pytest.approx(ratio, rel=1e-5), name


def test_weights_are_drawn_as_the_table_says() -> None:
    d, layers, width = 96, 3, 100
    cfg = tiny_config(d_model=d, n_layers=layers, vocab_size=500, experts=ExpertsConfig(5, 2, width))
    q = cfg.attention.n_heads * cfg.attention.head_dim
    table = {
        "embedding.weight": 1.0,
        "head.weight": 0.02,
        **dict.fromkeys(["attention.wq.weight", "attention.wk.weight", "attention.wv.weight"], 0.5 / d**0.5),
        "moe.router.weight": 0.5 / d**0.5,
        "moe.experts.w_in_EGFD": 0.5 / d**0.5,
        "attention.wo.weight": 0.5 / q**0.5 / (2 * layers) ** 0.5,
        "moe.experts.w_out_EDF": 0.5 / width**0.5 / (2 * layers) ** 0.5,
    }
    seen = 0
    for name, p in Transformer(cfg).named_parameters():
        if name.endswith("norm.weight"):
            assert (p == 1).all()
            continue
        std = next(value for ending, value in table.items() if name.endswith(ending))
        n, seen = p.numel(), seen + 1
        # Five standard errors of a normal sample's mean and standard deviation.
        assert abs(p.mean().item()) < 5 * std / n**0.5, name
        assert abs(p.std().item() / std - 1) < 5 / (2 * n) ** 0.5, name
    assert seen == 2 + layers * 7
    tied = Transformer(dataclasses.replace(cfg, tie_embeddings=True)).head.weight
    assert abs(tied.std().item() / 0.02 - 1) < 5 / (2 * tied.numel()) ** 0.5
