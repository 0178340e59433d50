"""The roofline of an engine's passes: experts that are counted, loads that add up, rows that the planner fits."""

from pathlib import Path

import pytest
import torch

from moe import Transformer
from moe.plan.calibrate import append_row, calibrate, read_steps
from moe.plan.flops import flops_per_token, head_flops
from moe.plan.hardware import load_hardware
from moe.plan.passes import Bytes, pass_load
from moe.plan.shape import shape_of
from moe.profile.observe import Pass, observe
from moe.serve import roofline
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from tests.conftest import tiny_config

CPU = load_hardware("cpu")
CFG = tiny_config(n_kv_heads=2)
SHAPE = shape_of(CFG)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CFG, seed=3)


def routed(model: Transformer, tokens: list[int]) -> list[set[tuple[int, int]]]:
    """For each position, (layer, expert) pairs, by the model's own modules."""
    seen: list[Pass] = []
    with torch.no_grad(), observe(model, seen.append):
        model(torch.tensor([tokens]))
    ids_TLK = seen[0].ids_LTK.transpose(0, 1).tolist()
    return [{(n, e) for n, row in enumerate(token) for e in row} for token in ids_TLK]


def test_experts_are_those_that_the_tokens_of_a_pass_take(model: Transformer) -> None:
    engine = Engine(model, max_batch_tokens=5)
    with roofline.watch(engine, CPU) as found:
        outputs = engine.generate([[1, 2, 3, 4, 5, 6, 7], [9, 8]], GREEDY)
    passes = found.passes()
    assert engine.listeners == []
    one, other = (routed(model, [*o.prompt_token_ids, *o.token_ids]) for o in outputs)
    # Five tokens of the first prompt; then its rest beside the other prompt.
    assert [(p.tokens, p.requests) for p in passes[:3]] == [(5, 1), (4, 2), (2, 2)]
    for p, tokens in zip(passes, (one[:5], [*one[5:7], *other[:2]], [one[7], other[2]]), strict=False):
        pairs = [pair for token in tokens for pair in token]
        assert p.experts == len(set(pairs)) / 2
        assert p.tokens_per_expert == len(pairs) / len(set(pairs))
        busiest = [max(pairs.count((n, e)) for e in range(5)) for n in range(2)]
        assert p.busiest == sum(busiest) / 2
        assert p.experts_expected == pytest.approx(5 * (1 - (3 / 5) ** p.tokens))
        assert p.experts_most == min(2 * p.tokens, 5)


def test_loads_are_of_what_was_computed(model: Transformer) -> None:
    engine = Engine(model, max_batch_tokens=4)
    with roofline.watch(engine, CPU) as found:
        (output,) = engine.generate([[1, 2, 3, 4, 5, 6, 7]], GREEDY)
    passes, n = found.passes(), 7 + 6 - 1  # the last token is not computed
    assert sum(p.tokens for p in passes) == n
    # The output layer runs for the six new tokens alone.
    assert sum(p.load.flop for p in passes) == n * flops_per_token(SHAPE, n + 1) - (n - 6) * head_flops(SHAPE)
    experts = routed(model, [*output.prompt_token_ids, *output.token_ids])
    touched = [sum(layer == n for layer, _ in set.union(*experts[:4])) for n in range(2)]
    want = pass_load(SHAPE, [(0, 4)], 0, touched, Bytes())
    assert passes[0].load == want
    assert passes[0].floor == max(want.flop / 179e9, want.bytes / 20e9)
    for p in passes:
        assert p.seconds > 0
        assert p.roofline_fraction == p.floor / p.seconds
    more = [p.predicted > p.floor for p in passes if p.experts_expected > p.experts]
    assert all(more)


def test_drafts_are_computed_and_their_logits_wanted(model: Transformer) -> None:
    engine = Engine(model, speculative="ngram", adaptive=False, num_drafts=3)
    with roofline.watch(engine, CPU) as found:
        engine.generate([[5, 6, 7] * 5], SamplingParams(temperature=0, max_tokens=12))
    passes = found.passes()
    assert engine.stats.drafted > 0
    assert sum(p.tokens for p in passes) == engine.stats.tokens
    wanted = engine.stats.drafted + len(passes)
    per_token = flops_per_token(SHAPE, 0) - head_flops(SHAPE)
    scores = sum(p.load.flop for p in passes) - engine.stats.tokens * per_token - wanted * head_flops(SHAPE)
    assert scores > 0  # of attention, which depends on positions
    assert scores % (2 * 4 * 10 * 2) == 0  # queries and values of four heads of 10, two layers


def test_rows_are_fitted_by_the_planner(model: Transformer, tmp_path: Path) -> None:
    engine = Engine(model)
    with roofline.watch(engine, CPU) as found:
        engine.generate([[1, 2, 3], [4, 5]], GREEDY)
    rows = found.plan_rows()
    for row in rows:
        append_row(tmp_path / "plan.csv", row)
    steps = read_steps(tmp_path / "plan.csv")
    assert [(s.kind, s.flop, s.seconds) for s in steps] == [("serve", r["flop"], r["seconds"]) for r in rows]
    assert calibrate(steps).rate > 0


def test_this_machine_is_measured() -> None:
    found = roofline.machine(torch.device("cpu"), torch.float32)
    assert found.name.startswith(f"{torch.get_num_threads()} thread")
    assert 1e8 < found.peak("fp32").to("FLOP/s") < 1e15
    assert 1e8 < found.bandwidth.to("B/s") < 1e13
    assert found.compute_dtype("fp32") == "fp32"
