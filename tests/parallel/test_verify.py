"""`verify` passes where all is right, and sees every fault that a mesh could have and no loss would show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe.parallel import context, expert, step, tensor
from moe.parallel.degrees import Degrees
from moe.parallel.verify import Row, verify
from tests.parallel import ranks
from tests.parallel.test_parallelize import config


def run(mesh: str, fault: str, **settings: Any) -> list[Row]:
    return ranks.run(Degrees.parse(mesh).world, faulty, fault, mesh, settings)[0]


def faulty(fault: str, mesh: str, settings: dict[str, Any]) -> list[Row]:
    if fault:
        FAULTS[fault][1]()
    return verify(config(), Degrees.parse(mesh, **settings), seq_len=16)


def wrong(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if not row.holds}


@pytest.mark.parametrize(("mesh", "settings"), [("tp=2,dp_shard=2,ep=2", {}), ("tp=2,pp=2", {"schedule": "zbv"})])
def test_what_is_right_holds(mesh: str, settings: dict[str, Any]) -> None:
    rows = run(mesh, "", **settings)
    assert not wrong(rows)
    names = {row.name for row in rows}
    assert {"loss", "balance loss", "z-loss", "gradient norm", "routed tokens"} <= names
    assert {"gradient blocks.2.moe.experts.w_in_EGFD", "after a step head.weight"} <= names
    assert len(rows) == 5 + 2 * sum(1 for name in names if name.startswith("gradient ") and name != "gradient norm")


def test_single_precision_has_its_own_tolerance() -> None:
    def worst(rows: list[Row]) -> float:
        return max(row.error for row in rows if row.name.startswith("gradient"))

    rows = ranks.run(2, in_float32)[0]
    assert not wrong(rows)
    assert 1e-9 < worst(rows) < 1e-5


def in_float32() -> list[Row]:
    return verify(config(), Degrees(tp=2), seq_len=16, dtype=torch.float32)


# ------------------------------------------------------------------------------------------- faults that loss hides


def no_reduction_below_the_experts() -> None:
    """What comes back from the experts' widths is each rank's part, and is taken for the whole."""
    tensor.shared = lambda x, group: x


def router_counted_by_every_rank() -> None:
    """All ranks have the router's whole gradient, and their parts are added."""
    tensor.repeated = lambda x, times: x


def whole_key_heads() -> None:
    """Keys and values of all heads on each rank: each has the gradient of its own queries, taken for the whole."""
    plain = tensor.localize

    def localize(module: Any, kind: Any = None, **gradients: Any) -> None:
        plain(module, kind, **({} if kind is tensor.KeyHeads else gradients))

    tensor.localize = localize


def no_reduction_behind_a_gather() -> None:
    """The gradient of what was gathered is the rank's own piece, without the other ranks' parts."""

    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        dim, group = ctx.where
        return dy.chunk(group.size(), dim)[group.rank()].contiguous(), None, None

    from moe.parallel import collectives

    collectives._Gathered.backward = staticmethod(backward)


def norms_of_a_piece() -> None:
    """A norm's weight has the gradient of the rank's piece of the sequence alone."""
    step.finish_gradients = lambda parameters: None
    tensor._norm = lambda norm, mesh: (
        tensor.distribute(norm, "weight", mesh, tensor.Replicate()),
        tensor.localize(norm),
    )


def loss_of_each_rank() -> None:
    """Divided by the rank's own targets: right where all have equally many."""
    plain = step.counts_of

    def counts_of(targets_BS: torch.Tensor, meshes: Any) -> Any:
        whole = plain(targets_BS, meshes)
        return whole._replace(targets=int((targets_BS != -100).sum()) * meshes.degrees.dp)

    step.counts_of = counts_of


def balance_of_a_piece() -> None:
    """Under context parallelism every rank balances its own piece of a sequence."""
    context._whole = lambda group, module, args, out: out


def router_without_the_rows_elsewhere() -> None:
    """Under expert parallelism routing weights lose their gradient on the way."""
    plain = expert.DividedExperts.forward

    def forward(self: Any, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return plain(self, x, weights.detach(), ids)

    expert.DividedExperts.forward = forward  # type: ignore[method-assign]


def tokens_counted_twice() -> None:
    """As recomputation in a backward would count them."""
    plain = step.expert_counts
    step.expert_counts = lambda ids, n: 2 * plain(ids, n)


def bias_by_the_degree() -> None:
    """What all ranks of tp have is added once for each of them."""
    tensor.scattered_sum, plain = (lambda x, dim, group: group.size() * plain(x, dim, group)), tensor.scattered_sum


FAULTS: dict[str, tuple[str, Callable[[], None]]] = {
    f.__name__: (mesh, f)
    for mesh, f in [
        ("tp=2", no_reduction_below_the_experts),
        ("tp=2", router_counted_by_every_rank),
        ("tp=2", whole_key_heads),
        ("tp=2", no_reduction_behind_a_gather),
        ("tp=2", norms_of_a_piece),
        ("dp_shard=2", loss_of_each_rank),
        ("cp=2", balance_of_a_piece),
        ("dp_shard=2,ep=2", router_without_the_rows_elsewhere),
        ("dp_shard=2", tokens_counted_twice),
        ("tp=2", bias_by_the_degree),
    ]
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str) -> None:
    rows = run(FAULTS[fault][0], fault)
    assert wrong(rows), "nothing was noticed"
