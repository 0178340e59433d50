"""The engine's answers: the same tokens whatever the limits, several answers to a prompt, log-probabilities, ends."""

import codecs
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe import Transformer
from moe.errors import ConfigError, QueueFullError
from moe.plan.memory import kv_bytes_per_token
from moe.serve import Delta, Engine, Logprob, SamplingParams, Step, room
from tests.conftest import tiny_config
from tests.serve.scripted import (
    MODEL,
    Dictated,
    Letters,
    V,
    assert_empty,
    greedy_answer,
    prompts,
    scripted_engine,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12)
TOKENIZER: Any = Letters()


# ------------------------------------------------------------------------------------------------- the same whatever


def test_seeded_tokens_are_the_same_alone_in_a_batch_after_preemptions_and_with_named_drafts() -> None:
    every = prompts(12)
    params = [
        SamplingParams(max_tokens=12, temperature=0.4 + i / 10, seed=i, top_p=0.95, repetition_penalty=1.1)
        for i in range(len(every))
    ]
    alone = [scripted_engine().generate(p, s)[0] for p, s in zip(every, params, strict=True)]
    assert len({tuple(o.token_ids) for o in alone}) == len(every)
    for speculative in (None, "ngram"):
        engine = scripted_engine(num_blocks=12, max_running=6, speculative=speculative)
        outputs = engine.generate(every, params)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
        assert engine.stats.preemptions > 5
        assert_empty(engine)


def test_unseeded_answers_differ() -> None:
    outputs = scripted_engine().generate([[5]] * 5, SamplingParams(max_tokens=10))
    assert len({tuple(o.token_ids) for o in outputs}) == 5


# ------------------------------------------------------------------------------------------ several answers to a prompt


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [64, 12])
def test_answers_to_one_prompt_are_those_of_seeds_in_a_row_and_share_its_blocks(
    prefix_cache: bool, num_blocks: int
) -> None:
    prompt = prompts(1, seed=1)[0] + [1, 2, 3] * 4
    several = SamplingParams(max_tokens=8, seed=7, n=4, logprobs=1, prompt_logprobs=0)
    engine = scripted_engine(prefix_cache=prefix_cache, num_blocks=num_blocks, max_batch_tokens=6)
    (output,) = engine.generate([prompt], several)
    assert [o.index for o in output.outputs] == [0, 1, 2, 3]
    assert {o.id for o in output.outputs} == {output.id}
    for i, one in enumerate(output.outputs):
        (want,) = scripted_engine().generate(prompt, SamplingParams(max_tokens=8, seed=7 + i))
        assert (one.token_ids, one.finish_reason) == (want.token_ids, "length")
        assert one.logprobs is not None
        assert [next(iter(each)) for each in one.logprobs] == one.token_ids
        cached = (len(prompt) - 1) // 4 * 4 if prefix_cache and i else 0
        assert one.cached_tokens == cached or num_blocks == 12
    assert (output.prompt_logprobs is not None, output.siblings[0].prompt_logprobs) == (True, None)
    assert_empty(engine)


def test_of_several_answers_each_ends_by_itself_and_all_can_be_aborted_at_any_step() -> None:
    params = SamplingParams(max_tokens=9, seed=3, n=3, stop_token_ids=range(0, V, 4))
    engine = scripted_engine()
    deltas = [*engine.stream([4, 4, 4, 4, 4], params)]
    ends = [d for d in deltas if d.finish_reason]
    assert sorted(d.index for d in ends) == [0, 1, 2]
    assert len({deltas.index(d) for d in ends}) == 3
    assert [d.output is not None for d in ends] == [False, False, True]
    whole = ends[-1].output
    assert whole is not None
    for one in whole.outputs:
        assert one.token_ids == [t for d in deltas if d.index == one.index for t in d.token_ids]
    for steps in range(6):
        name = engine.add([4, 4, 4, 4, 4], params)
        for _ in range(steps):
            engine.step()
        engine.abort(name)
        last = [d for d in engine.step() if d.output]
        assert [d.output.outputs[-1].finish_reason for d in last if d.output] == ["abort"] * len(last)
        assert_empty(engine)
    assert [*engine.stream([4], SamplingParams(max_tokens=1, n=3, seed=0))][-1].output is not None


# -------------------------------------------------------------------------------------------------- log-probabilities


@given(
    budget=st.integers(1, 40),
    block_size=st.integers(1, 8),
    spare=st.integers(0, 8),
    speculative=st.sampled_from([None, "ngram"]),
    warm=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=6)
def test_log_probabilities_are_those_of_the_uncached_model(
    budget: int, block_size: int, spare: int, speculative: str | None, warm: bool, seed: int
) -> None:
    engine = Engine(
        MODEL, block_size=block_size, num_blocks=-(-32 // block_size) + spare, max_batch_tokens=budget, max_running=4,
        speculative=speculative, adaptive=False,
    )  # fmt: skip
    every = [p if i % 2 else [*p[:3], 7, 7, 7, 7, 7] for i, p in enumerate(prompts(5, seed))]
    if warm:
        engine.generate(every, GREEDY)
    params = [
        SamplingParams(
            max_tokens=8, temperature=0.7 * (i % 2), seed=i, repetition_penalty=1.2, logit_bias={3: 2.0},
            logprobs=[None, 0, 3][i % 3], prompt_logprobs=[2, None, 0][i % 3],
        )
        for i in range(len(every))
    ]  # fmt: skip
    for output, p in zip(engine.generate(every, params), params, strict=True):
        tokens = output.prompt_token_ids + output.token_ids
        with torch.no_grad():
            log_SV = MODEL(torch.tensor([tokens])).logits_BSV[0].double().log_softmax(-1)
        assert (output.logprobs is None, output.prompt_logprobs is None) == (
            p.logprobs is None,
            p.prompt_logprobs is None,
        )
        first = len(output.prompt_token_ids)
        if output.prompt_logprobs is not None and p.prompt_logprobs is not None:
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == first
            check_logprobs(output.prompt_logprobs[1:], tokens[1:first], log_SV[: first - 1], p.prompt_logprobs)
        if output.logprobs is not None and p.logprobs is not None:
            check_logprobs(output.logprobs, output.token_ids, log_SV[first - 1 : -1], p.logprobs)


def check_logprobs(found: Sequence[dict[int, Logprob] | None], tokens: Sequence[int], log_SV: Tensor, top: int) -> None:
    assert len(found) == len(tokens)
    for one, token, log_V in zip(found, tokens, log_SV, strict=True):
        assert one is not None
        assert next(iter(one)) == token
        assert set(one) == {token, *log_V.topk(top).indices.tolist()}
        for i, (logprob, rank, text) in one.items():
            assert logprob == pytest.approx(float(log_V[i]), abs=1e-4)
            assert rank == int((log_V > log_V[i]).sum()) + 1
            assert text is None


# ------------------------------------------------------------------------------------------------------ ends and text


def reference(answer: Sequence[int], p: SamplingParams) -> tuple[int, str, str]:
    """How many tokens, the text, and why it ends: by the settings' descriptions."""
    decoder, text = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for n, token in enumerate(answer, 1):
        before, may_end = len(text), n > p.min_tokens
        if may_end and (token in p.stop_token_ids or (token == TOKENIZER.eot_id and not p.ignore_eos)):
            return n, text + decoder.decode(b"", True), "stop"
        text += decoder.decode(TOKENIZER.token_bytes(token))
        begins = [text.find(s, max(0, before + 1 - len(s))) for s in p.stop]
        if may_end and any(i >= 0 for i in begins):
            return n, text[: min(i for i in begins if i >= 0)], "stop"
        if n == p.max_tokens:
            return n, text + decoder.decode(b"", True), "length"
    raise AssertionError


@given(
    answer=st.lists(st.integers(0, 44) | st.just(TOKENIZER.eot_id), min_size=14, max_size=14),
    stop=st.lists(st.sampled_from(["ab", "abc", "c", "stop", "é", "b a", "\n\n", "op"]), max_size=3),
    stop_token_ids=st.sets(st.integers(0, 44), max_size=2),
    min_tokens=st.integers(0, 9),
    max_tokens=st.integers(9, 14),
    ignore_eos=st.booleans(),
    drafts=st.lists(st.lists(st.booleans(), max_size=4), min_size=14, max_size=14),
)
@settings(max_examples=100)
def test_text_ends_where_it_should_and_a_stop_string_is_never_seen(
    answer: list[int],
    stop: list[str],
    stop_token_ids: set[int],
    min_tokens: int,
    max_tokens: int,
    ignore_eos: bool,
    drafts: list[list[bool]],
) -> None:
    # Before min_tokens the model is not let say a token that ends the text; it says something else.
    answer = [
        0 if i < min_tokens and (t in stop_token_ids or (t == TOKENIZER.eot_id and not ignore_eos)) else t
        for i, t in enumerate(answer)
    ]
    stop_token_ids -= {0}
    p = SamplingParams(
        temperature=0, max_tokens=max_tokens, min_tokens=min_tokens, stop=stop, stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
    )  # fmt: skip
    engine = Engine(MODEL, TOKENIZER, block_size=4, num_blocks=16, speculative=Hints(answer, drafts), adaptive=False)
    engine.runner = Dictated(3, answer)  # type: ignore[assignment]
    deltas = [*engine.stream([1, 2, 3], p)]
    n, text, reason = reference(answer, p)
    output = deltas[-1].output
    assert output is not None
    assert (output.token_ids, output.text, output.finish_reason) == (answer[:n], text, reason)
    assert [t for d in deltas for t in d.token_ids] == answer[:n]
    assert "".join(d.text for d in deltas) == text


class Hints:
    """Guesses that are right where it is said so."""

    def __init__(self, answer: list[int], right: list[list[bool]]) -> None:
        self.answer, self.right = answer, right

    def propose(self, requests: Sequence[Any], counts: Sequence[int]) -> list[Any]:
        at = [len(r.output) for r in requests]
        return [
            ([self.answer[i + k] if ok else 1 for k, ok in enumerate(self.right[i][:n])], None)
            for i, n in zip(at, counts, strict=True)
        ]

    def behind(self, request: Any) -> int:
        return 0

    def forget(self, request: Any) -> None: ...


def test_an_end_token_is_not_drawn_before_min_tokens() -> None:
    ends = set(range(V)) - {11, 12}
    p = SamplingParams(max_tokens=10, min_tokens=6, stop_token_ids=ends, seed=1)
    (output,) = scripted_engine().generate([3], p)
    assert {11, 12} >= set(output.token_ids[:6])
    assert output.finish_reason == "stop"
    assert output.token_ids[-1] in ends


def test_the_last_token_of_all_comes_from_a_full_context() -> None:
    engine = scripted_engine()
    for length in (39, 40):
        (output,) = engine.generate([[1] * length], SamplingParams(max_tokens=None, temperature=0))
        assert output.token_ids == greedy_answer([1] * length, 41 - length)
    with pytest.raises(ConfigError, match="prompt: the context of tiny is 40, and it has 41 tokens; cut it"):
        engine.add([1] * 41)


# --------------------------------------------------------------------------------------------- requests come and go


def test_streams_side_by_side_each_get_their_own_and_a_closed_one_leaves_nothing() -> None:
    engine = scripted_engine()
    one, other, third = (engine.stream([i], GREEDY) for i in (1, 2, 3))
    next(third)
    found: tuple[list[Delta], list[Delta]] = [], []
    for a, b in zip(one, other, strict=True):
        found[0].append(a)
        found[1].append(b)
    for i, deltas in enumerate(found, 1):
        assert [t for d in deltas for t in d.token_ids] == greedy_answer([i], 12)
    third.close()
    assert_empty(engine)


def test_who_listens_may_abort_others_of_the_same_pass() -> None:
    engine = scripted_engine()
    names = [engine.add([1], GREEDY, listener=lambda _: engine.abort(names[1])), engine.add([2], GREEDY)]
    outputs = {d.request_id: d.output for d in engine.step() if d.output}
    while not engine.idle:
        outputs |= {d.request_id: d.output for d in engine.step() if d.output}
    first, second = (outputs[n] for n in names)
    assert first is not None
    assert second is not None
    assert (first.finish_reason, first.token_ids) == ("length", greedy_answer([1], 12))
    assert (second.finish_reason, second.token_ids) == ("abort", [])
    assert_empty(engine)


@pytest.mark.parametrize("ends", ["abort", "error"])
def test_who_listens_may_abort_the_other_answers_to_the_prompt_while_they_end(ends: str) -> None:
    def fault(_: int) -> None:
        if engine.stats.steps == 3:
            raise RuntimeError("a kernel failed")

    engine = scripted_engine(fault)
    outputs = []

    def listener(delta: Delta) -> None:
        outputs.extend([delta.output] if delta.output else [])
        if delta.finish_reason:
            engine.abort(name)

    name = engine.add([1], SamplingParams(temperature=0, max_tokens=9, n=3), listener=listener)
    for _ in range(3):
        engine.step()
    if ends == "abort":
        engine.abort(name)
    engine.step()
    (output,) = outputs
    assert sorted(o.finish_reason for o in output.outputs) == sorted([ends, "abort", "abort"])
    assert_empty(engine)


def test_where_one_prompt_is_refused_none_is_taken() -> None:
    engine = scripted_engine(max_waiting=3)
    with pytest.raises(ConfigError, match="prompt has id 61: must be an id of the vocabulary, 0 to 60"):
        engine.generate([[1], [2], [61]], GREEDY)
    with pytest.raises(QueueFullError, match="3 requests wait"):
        engine.generate([[1], [2], [3], [4]], GREEDY)
    assert_empty(engine)
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, r"prompt = \[\]: must have at least one token"),
        ("ab", {}, "prompt: text needs a tokenizer"),
        ([1], {"logit_bias": {61: 1}}, "logit_bias has id 61"),
        ([1], {"stop_token_ids": [-1]}, "stop_token_ids has id -1"),
        ([1], {"stop": "x"}, r"stop = \('x',\): text needs a tokenizer"),
        ([1], {"logprobs": 62}, "logprobs = 62: the vocabulary has 61"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_by_name(prompt: Any, settings: dict, message: str) -> None:
    engine = scripted_engine()
    with pytest.raises(ConfigError, match=message):
        engine.add(prompt, SamplingParams(**settings))
    assert_empty(engine)


def test_a_name_is_not_given_twice() -> None:
    engine = scripted_engine()
    engine.add([1], request_id="a")
    with pytest.raises(ConfigError, match="request_id = 'a': is the name of a request that is not done yet"):
        engine.add([1], request_id="a")
    engine.abort("a")
    engine.add([1], request_id="a")


def test_every_pass_is_reported() -> None:
    engine = scripted_engine(max_batch_tokens=7, speculative="ngram")
    steps: list[Step] = []
    engine.listeners.append(steps.append)
    engine.generate([[1, 2] * 5, [3] * 4], GREEDY)
    assert [s.number for s in steps] == [*range(1, engine.stats.steps + 1)]
    assert sum(s.n_tokens for s in steps) == engine.stats.tokens
    assert sum(map(sum, (s.drafted for s in steps))) == engine.stats.drafted > 0
    assert sum(map(sum, (s.accepted for s in steps))) == engine.stats.accepted
    assert max(s.n_tokens for s in steps) == 7
    assert all(len(b) * 4 >= c for s in steps for b, c in zip(s.blocks, s.contexts, strict=True))
    assert all(a <= d for s in steps for a, d in zip(s.accepted, s.drafted, strict=True))


# ------------------------------------------------------------------------------------------------------------- memory


def test_blocks_are_as_many_as_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(p.numel() * 4 for p in MODEL.parameters())
    token = int(kv_bytes_per_token(MODEL.cfg, "fp32").to("B/token"))
    for contexts, want in ((1.0, 10), (1.5, 15), (100.0, 30)):
        monkeypatch.setattr(room, "free_memory", lambda _, n=contexts: weights + 2 * int(n * 40) * token)
        engine = Engine(MODEL, block_size=4, max_running=3)
        assert engine.scheduler.pool.n_blocks == want
        kept = [t for pair in engine.runner.pages.layers for t in pair]
        assert sum(t.numel() * t.element_size() for t in kept) == (want + 1) * 4 * token
    both = Engine(MODEL, block_size=4, max_running=3, speculative=Transformer(tiny_config(), seed=1))
    assert both.scheduler.pool.n_blocks == 30
    monkeypatch.setattr(room, "free_memory", lambda _: weights + 79 * token)
    with pytest.raises(
        ConfigError, match=r"num_blocks = None: keys and values of 40 tokens, the context of tiny, take"
    ):
        Engine(MODEL, block_size=4)
