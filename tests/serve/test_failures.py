"""Passes that fail: what ends, what goes on, and that nothing is left of either."""

import random

import pytest
import torch

from moe import Transformer
from moe.errors import ServeError
from moe.serve import Engine, Output, SamplingParams
from tests.conftest import tiny_config
from tests.serve.scripted import TABLE_NV, V, assert_empty, check_blocks, greedy_answer, prompts, scripted_engine

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_for_want_of_memory_passes_become_smaller_and_then_larger_again() -> None:
    sizes: list[int] = []

    def fault(n: int) -> None:
        sizes.append(n)
        if n > 9 and len(sizes) < 30:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = scripted_engine(fault, num_blocks=100, max_running=20)
    every = prompts(30)
    params = SamplingParams(temperature=0, max_tokens=15)
    outputs = engine.generate(every, params)
    assert [o.token_ids for o in outputs] == [greedy_answer(p, 15) for p in every]
    assert engine.stats.out_of_memory > 1
    assert max(sizes[60:]) > 9
    assert_empty(engine)


def test_a_pass_that_fails_ends_its_requests_and_no_others() -> None:
    def fault(n: int) -> None:
        if bad:
            raise RuntimeError("a kernel failed")

    bad: list[int] = []
    engine = scripted_engine(fault, max_running=2, max_batch_tokens=2)
    names = [engine.add([i], SamplingParams(temperature=0, max_tokens=5, n=2)) for i in range(3)]
    engine.step()
    bad.append(1)
    lost = {d.request_id for d in engine.step() if d.output and d.output.error}
    bad.clear()
    assert 1 <= len(lost) < 3
    outputs: dict[str, Output] = {}
    while not engine.idle:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output}
    assert outputs.keys() == set(names) - lost
    for name, output in outputs.items():
        assert output.token_ids == greedy_answer([names.index(name)], 5)
    bad.append(1)
    with pytest.raises(ServeError, match="RuntimeError: a kernel failed"):
        engine.generate([[1], [2]], GREEDY)
    with pytest.raises(ServeError, match="RuntimeError: a kernel failed"):
        list(engine.stream([1], GREEDY))
    assert_empty(engine)


def test_a_single_token_for_which_there_is_no_memory_is_an_error() -> None:
    def fault(n: int) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    engine = scripted_engine(fault)
    with pytest.raises(ServeError, match="can't allocate memory"):
        engine.generate([[1] * 30], GREEDY)
    assert engine.stats.out_of_memory == 5
    assert_empty(engine)


def test_logits_that_are_no_numbers_end_their_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TABLE_NV.clone()
    rows[:, 0] = torch.where(torch.arange(499) % 7 == 0, torch.nan, rows[:, 0])
    monkeypatch.setattr("tests.serve.scripted.TABLE_NV", rows)
    for temperature in (0, 1):
        engine = scripted_engine()
        params = SamplingParams(temperature=temperature, max_tokens=6, seed=0, logprobs=0)
        for prompt in prompts(12):
            engine.add(prompt, params)
        found = []
        while not engine.idle:
            found += [d.output for d in engine.step() if d.output]
        reasons = [o.finish_reason for o in found]
        assert {"error", "length"} == set(reasons)
        assert all("no numbers (NaN)" in str(o.error) for o in found if o.finish_reason == "error")
        assert all(0 <= t < V for o in found for t in o.token_ids)
        assert_empty(engine)


def test_keys_and_values_that_are_no_numbers_are_met_with_by_nobody_else() -> None:
    model = Transformer(tiny_config(), seed=3)
    with torch.no_grad():
        model.embedding.weight[60] = torch.nan
    engine = Engine(model, block_size=8, num_blocks=10, max_running=2)
    start = prompts(1)[0][:9]
    good = [p for p in ([*start, *p] for p in prompts(12, 1)) if 60 not in p]
    want = [model.generate(torch.tensor([p]), 4, temperature=0)[0, len(p) :].tolist() for p in good]
    params = SamplingParams(temperature=0, max_tokens=4)
    for prompt, tokens in zip(good, want, strict=True):
        bad = engine.add([*start, *[60] * 12], params)
        name = engine.add(prompt, params)
        found = {}
        while not engine.idle:
            found |= {d.request_id: d.output for d in engine.step() if d.output}
        assert found[bad].finish_reason == "error"
        assert found[name].token_ids == tokens
    with pytest.raises(ServeError, match="no numbers"):
        engine.generate([[60]], params)
    assert_empty(engine)


def test_a_proposer_that_fails_for_want_of_memory_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(speculative="ngram")
    error: Exception = MemoryError()
    monkeypatch.setattr(engine.proposer, "propose", lambda *_: (_ for _ in ()).throw(error))
    (output,) = engine.generate([[1, 1, 1]], GREEDY)
    assert output.token_ids == greedy_answer([1, 1, 1], 12)
    error = ValueError("a bug")
    with pytest.raises(ServeError, match="ValueError: a bug"):
        engine.generate([[1, 1, 1]], GREEDY)
    assert_empty(engine)


def test_an_interrupt_leaves_the_engine_as_it_was() -> None:
    def fault(n: int) -> None:
        if rng.random() < 0.3:
            raise KeyboardInterrupt

    rng = random.Random(0)
    engine = scripted_engine(fault)
    name = engine.add([1, 2, 3], GREEDY)
    output = None
    while not engine.idle:
        try:
            output = next((d.output for d in engine.step() if d.output), None)
        except KeyboardInterrupt:
            check_blocks(engine)
    assert output is not None
    assert (output.id, output.token_ids) == (name, greedy_answer([1, 2, 3], 12))
