"""The parts of a step: that they are told apart, and add up to the whole."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe import profile
from moe.config import load_config
from moe.kernels.spans import span
from moe.model import Transformer
from moe.profile.step import trace_step
from tests.hf_models import MODELS, build

CFG = load_config("replica-tiny")
L = CFG.n_layers


@pytest.fixture
def model() -> Transformer:
    return Transformer(CFG)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(CFG.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes one second further at each look."""
    clock = itertools.count()
    monkeypatch.setattr("moe.profile.stopwatch.time.perf_counter", lambda: float(next(clock)))


def test_time_belongs_to_the_innermost_part(model: Transformer, ticks: None) -> None:
    with profile.timing(model) as t:  # looks at 0
        with span("up"):  # 1
            with span("down", "backward"):  # 2
                pass  # 3
            with span("down", "backward"):  # 4
                pass  # 5
        pass  # 6; the end is 7
    assert t.seconds == {
        ("other", ""): 1.0 + 1.0,
        ("up", "forward"): 1.0 + 1.0 + 1.0,
        ("down", "backward"): 2.0,
    }
    assert t.total == 7.0
    assert t.calls["down", "backward"] == 2


def test_every_part_of_a_training_step_is_seen(model: Transformer, tokens: torch.Tensor, ticks: None) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    with profile.timing(model) as t:
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
    once = {"head": 1, "embedding": 1, "norm": 2 * L + 1, "projections": 4 * L}
    per_layer = dict.fromkeys(["attention", "router", "experts", "permute", "up", "down", "combine"], L)
    want: dict[tuple[str, str], int] = {}
    for phase in ("forward", "backward"):
        want |= {(component, phase): n for component, n in (once | per_layer).items()}
    want["router", "forward"] += 1  # its losses, of all layers together
    assert t.calls == want | {("optimizer", "update"): 1}
    # Each entering and each leaving looked at the clock, and so did the beginning and the end.
    assert t.total == 2 * sum(t.calls.values()) + 1


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_checkpointing_computes_again_has_a_phase_of_its_own(
    model: Transformer, tokens: torch.Tensor, mode: str
) -> None:
    model.activation_checkpointing = mode
    with profile.timing(model) as t:
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    assert t.calls["attention", "recompute"] == t.calls["up", "recompute"] == t.calls["norm", "recompute"] / 2 == L
    # Selective checkpointing keeps what the experts gave: of them, only the pre-activations are made again.
    assert t.calls["down", "recompute"] == t.calls["combine", "recompute"] == (L if mode == "full" else 0)
    assert t.calls["up", "backward"] == t.calls["down", "backward"] == t.calls["permute", "backward"] == L
    assert ("head", "recompute") not in t.calls


def test_measuring_changes_no_gradient(model: Transformer, tokens: torch.Tensor) -> None:
    model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with profile.timing(model):
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
    assert all(torch.equal(p.grad, want) for p, want in zip(model.parameters(), plain, strict=True))  # type: ignore[arg-type]
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_measurements_do_not_overlap_and_end_after_an_error(model: Transformer) -> None:
    with profile.timing(model), pytest.raises(RuntimeError, match="being measured already"), profile.timing(model):
        pass
    with pytest.raises(ValueError, match="outside the vocabulary"), profile.timing(model):
        model(torch.tensor([[10**6]]))
    with profile.timing(model) as t:
        model(torch.tensor([[1]]))
    assert t.calls["attention", "forward"] == L


@pytest.mark.parametrize("family", MODELS)
def test_forward_passes_of_transformers_models(family: str) -> None:
    model = build(family)
    with profile.timing(model) as t, torch.no_grad():
        model(input_ids=torch.randint(model.config.vocab_size, (2, 16)))
    n = model.config.num_hidden_layers
    for component in ("attention", "router", "experts"):
        assert t.calls[component, "forward"] == n
    assert t.calls["head", "forward"] == t.calls["embedding", "forward"] == 1


@pytest.mark.parametrize("what", ["forward", "backward", "train", "decode"])
def test_a_step_profile_has_a_floor_for_all_that_counts(model: Transformer, tokens: torch.Tensor, what: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    run = profile.make_run(model, what, tokens[:, :1] if what == "decode" else tokens, optimizer=optimizer, context=9)
    found = profile.profile_step(model, run, rounds=2)
    seen = {(r.component, r.phase) for r in found.rows}
    assert set(run.work) <= seen
    without = {c for r in found.rows if r.floor is None for c in [r.component]}
    assert without <= {"other", "experts", "head", "permute"}
    assert 0 < found.floor < found.seconds
    for row in found.rows:
        if row.flop is not None and row.bytes is not None and row.floor is not None:
            peak = found.ceilings.product_fp32
            assert row.floor == pytest.approx(max(row.flop / peak, row.bytes / found.ceilings.copy))


def test_bad_runs_are_refused(model: Transformer, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="needs an optimizer"):
        profile.make_run(model, "train", tokens)
    with pytest.raises(ValueError, match="context = 256: must be at least 0 and less than max_seq_len = 256"):
        profile.make_run(model, "decode", tokens[:, :1], context=256)


def test_a_trace_names_the_parts_and_knows_the_memory(model: Transformer, tokens: torch.Tensor, tmp_path: Path) -> None:
    run = profile.make_run(model, "backward", tokens)
    memory = trace_step(model, run, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {"up forward", "down backward", "router forward", "head forward"} <= names
    # At the end of the backward the gradients are there, and little else can have been there before.
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert gradients < max(memory.bytes) < 3 * gradients
    assert set(memory.phases) >= {"forward", "backward"}
    assert memory.seconds == sorted(memory.seconds)


def test_traced_memory_is_what_was_allocated(model: Transformer) -> None:
    run = profile.make_run(model, "forward", torch.zeros(1, 4, dtype=torch.int64))
    held: list[torch.Tensor] = []

    def allocate() -> None:
        with span("up"):
            held.append(torch.empty(2**24))
        with span("up", "backward"):
            held.append(torch.empty(2**24))
        held.clear()

    memory = trace_step(model, replace(run, call=allocate))
    assert 2**27 <= max(memory.bytes) < 2**27 + 2**16
    assert [phase for phase, b in zip(memory.phases, memory.bytes, strict=True) if b >= 2**27] == ["backward"]


def test_traced_memory_knows_nothing_of_an_earlier_trace(model: Transformer) -> None:
    """The profiler's own count goes on through the process, and misses what is freed outside of a trace."""
    run = profile.make_run(model, "forward", torch.zeros(1, 4, dtype=torch.int64))
    kept: list[torch.Tensor] = []

    def free_and_allocate(elements: int) -> None:
        kept.clear()
        with span("up"):
            kept.append(torch.empty(elements))

    for elements in (2**22, 2**21, 2**20):  # each larger one is there before the trace, and freed within it
        memory = trace_step(model, replace(run, call=lambda elements=elements: free_and_allocate(elements)))
        assert 4 * elements <= max(memory.bytes) < 4 * elements + 2**16
        assert min(memory.bytes) >= 0
        kept[:] = [torch.empty(2**23)]  # what was traced is freed now, with nobody counting
