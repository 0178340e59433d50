"""moe.model's sampling and `generate`: greedy, filters, seeds, frequencies, the end of the context, bad settings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import generate
from moe.generate import stream
from moe.model import Transformer, sample
from tests.conftest import tiny_config

PROMPT = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def model() -> Transformer:
    """With weights large enough that the next tokens are neither certain nor all alike."""
    made = Transformer(tiny_config())
    g = torch.Generator().manual_seed(3)
    for p in made.parameters():
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5
    return made


def test_greedy_takes_the_likeliest_token_each_time(model: Transformer) -> None:
    want = PROMPT
    for _ in range(8):  # without a cache: the whole text anew for each token
        want = torch.cat([want, model(want).logits_BSV[:, -1:].argmax(-1)], dim=1)
    got = model.generate(PROMPT, 8, temperature=0)
    assert torch.equal(got, want)
    assert len(set(want[0, 3:].tolist())) > 1


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrowest_filters_are_greedy(model: Transformer, sampling: dict) -> None:
    greedy = model.generate(PROMPT, 8, temperature=0)
    assert torch.equal(model.generate(PROMPT, 8, seed=5, **sampling), greedy)


def test_seed(model: Transformer) -> None:
    first, same, other = (model.generate(PROMPT, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    before = torch.get_rng_state()
    model.generate(PROMPT, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "torch's own random numbers are left alone"


def test_shape_prompt_and_stream(model: Transformer) -> None:
    out = model.generate(PROMPT, 5, seed=1)
    assert out.shape == (2, 8)
    assert torch.equal(out[:, :3], PROMPT)
    assert torch.equal(streamed(model, PROMPT, 5, temperature=0), model.generate(PROMPT, 5, temperature=0)[:, 3:])
    assert torch.equal(model.generate(PROMPT, 0), PROMPT)
    assert list(stream(model, PROMPT, 0)) == []


def streamed(model: Transformer, prompt: Tensor, n: int, **settings: Any) -> Tensor:
    return torch.stack(list(stream(model, prompt, n, **settings)), 1)


def test_the_seed_of_a_stream(model: Transformer) -> None:
    first, same, other = (streamed(model, PROMPT, 20, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    twice = streamed(model, PROMPT[:1].expand(2, -1), 20, seed=1)
    assert torch.equal(twice[0], first[0]), "the first row's draws are those of a batch of one"
    assert not torch.equal(twice[0], twice[1]), "equal prompts of a batch get draws of their own"
    before = torch.get_rng_state()
    streamed(model, PROMPT, 2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-6}])
def test_the_narrowest_filters_of_a_stream_are_greedy(model: Transformer, sampling: dict) -> None:
    assert torch.equal(streamed(model, PROMPT, 8, seed=5, **sampling), model.generate(PROMPT, 8, temperature=0)[:, 3:])


def test_prompts_longer_than_a_pass_come_out_side_by_side(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine takes several passes for the prompts, rows begin at different passes, and still go together."""
    real = generate.Engine

    def narrow(*args: Any, **settings: Any) -> Any:
        return real(*args, **{**settings, "max_batch_tokens": 2})

    monkeypatch.setattr(generate, "Engine", narrow)
    got = streamed(model, PROMPT, 50, temperature=0)
    assert torch.equal(got, model.generate(PROMPT, 50, temperature=0)[:, 3:])


def test_stops_when_the_context_is_full(model: Transformer) -> None:
    out = model.generate(PROMPT, 1000, temperature=0)
    # The last token is predicted from a full context of 40 and needs no place in it.
    assert out.shape == (2, 41)
    assert torch.equal(out[:, :30], model.generate(PROMPT, 27, temperature=0))
    assert model.generate(torch.zeros(1, 40, dtype=torch.int64), 5).shape == (1, 41)


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])


def chi_square(probabilities: Tensor, n: int = 20_000, **sampling: float) -> float:
    """Pearson's statistic of n draws; tokens of probability 0 must not occur at all."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **sampling}
    drawn = sample(LOGITS.expand(n, -1), **settings, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    counts, expected = torch.bincount(drawn, minlength=6).double(), n * probabilities.double()
    assert (counts[probabilities == 0] == 0).all()
    kept = probabilities > 0
    return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())


def renormalised(p: Tensor) -> Tensor:
    return p / p.sum()


# The 99.9% quantiles of chi-square with 1 .. 5 degrees of freedom.
QUANTILE = [10.83, 13.82, 16.27, 18.47, 20.52]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    want = (LOGITS.double() / temperature).softmax(0)
    assert chi_square(want, temperature=temperature) < QUANTILE[4]
    assert chi_square((LOGITS.double() / (temperature * 1.1)).softmax(0), temperature=temperature) > QUANTILE[4]


@pytest.mark.parametrize("top_k", [2, 3, 6, 100])
def test_frequencies_with_top_k(top_k: int) -> None:
    p = LOGITS.double().softmax(0)
    p[top_k:] = 0  # they are in falling order
    assert chi_square(renormalised(p), top_k=top_k) < QUANTILE[min(top_k, 6) - 2]


# Running sums of the probabilities: 0.46, 0.74, 0.91, 0.97, 0.997, 1; the token that crosses top_p is kept.
@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.5, 2), (0.74, 2), (0.75, 3), (0.99, 5), (1.0, 6)])
def test_frequencies_with_top_p(top_p: float, kept: int) -> None:
    p = LOGITS.double().softmax(0)
    p[kept:] = 0
    assert chi_square(renormalised(p), top_p=top_p) < QUANTILE[max(kept - 2, 0)]


def test_rows_are_sampled_each_by_its_own_logits() -> None:
    logits = torch.full((3, 5), -math.inf)
    logits[torch.arange(3), torch.tensor([4, 0, 2])] = 0.0
    assert sample(logits, 1.0, 0, 1.0, None).tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), {}, r"prompt = \[2, 0\]: must be \[B, S\] with S > 0"),
        (torch.zeros(3, dtype=torch.int64), {}, r"prompt = \[3\]: must be \[B, S\]"),
        (PROMPT, {"temperature": -0.1}, "temperature = -0.1: must be 0 or more"),
        (PROMPT, {"temperature": math.nan}, "temperature = nan: must be 0 or more"),
        (PROMPT, {"top_k": -1}, "top_k = -1: must be 0 .all. or more"),
        (PROMPT, {"top_p": 0.0}, r"top_p = 0.0: must be in \(0, 1\]"),
        (PROMPT, {"top_p": 1.1}, r"top_p = 1.1: must be in \(0, 1\]"),
        (PROMPT, {"eos_id": 61}, "eos_id = 61: must be an id of the vocabulary, 0 to 60"),
        (PROMPT, {"eos_id": [3, -1]}, "eos_id = -1: must be an id"),
        (torch.zeros(1, 41, dtype=torch.int64), {}, "sequence of 41 tokens, but max_seq_len = 40"),
    ],
)
def test_bad_input(model: Transformer, prompt: Tensor, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompt, 2, **settings)
    with pytest.raises(ValueError, match=message):
        list(stream(model, prompt, 2, **settings))


@pytest.mark.parametrize("name", ["do_sample", "max_length", "temprature", "eos_token_id"])
def test_an_unknown_setting_is_an_error(model: Transformer, name: str) -> None:
    for call in (model.generate, lambda *args, **settings: list(stream(model, *args, **settings))):
        with pytest.raises(TypeError, match=name):
            call(PROMPT, 2, **{name: 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [-1, -(2**40)])
def test_a_negative_number_of_tokens_is_an_error(model: Transformer, n: int) -> None:
    for call in (model.generate, lambda *args: list(stream(model, *args))):
        with pytest.raises(ValueError, match=f"max_new_tokens = {n}: must be 0 or more"):
            call(PROMPT, n)


# -------------------------------------------------------------------------------------------------------- the end


def cut(free_S: list[int], ends: set[int], length: int) -> list[int]:
    """What a sequence has to be, from one that knows no end: itself up to its end, then that again."""
    end = next((i for i, token in enumerate(free_S) if token in ends), len(free_S))
    return [*free_S[: end + 1], *[free_S[end]] * (length - end - 1)][:length] if end < len(free_S) else free_S[:length]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("several", [False, True])
def test_a_sequence_that_has_ended_repeats_its_end_until_all_have(model: Transformer, seed: int, several: bool) -> None:
    for write in (
        lambda **ends: model.generate(PROMPT, 30, seed=seed, **ends)[:, 3:],
        partial(streamed, model, PROMPT, 30, seed=seed),
    ):
        check_ends(write, several)


def check_ends(write: Callable[..., Tensor], several: bool) -> None:
    free = write().tolist()
    ends = {free[0][7], free[1][4]} if several else {free[0][7]}
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), 30) for row in free]
    n = max(lengths)
    want = [cut(row, ends, n) for row in free]
    eos_id = ends if several else ends.pop()
    assert write(eos_id=eos_id).tolist() == want
    if several:
        assert n < 30  # it ended before it had to


def test_an_end_in_the_prompt_ends_nothing_and_one_that_never_comes_neither(model: Transformer) -> None:
    greedy = model.generate(PROMPT, 8, temperature=0)
    unused = next(i for i in range(61) if i not in greedy)
    assert torch.equal(model.generate(PROMPT, 8, temperature=0, eos_id=unused), greedy)
    assert torch.equal(model.generate(PROMPT, 8, temperature=0, eos_id=[]), greedy)
    ends = [i for i in PROMPT[0].tolist() if i not in greedy[:, 3:]]
    assert torch.equal(model.generate(PROMPT, 8, temperature=0, eos_id=ends), greedy)


def test_prompts_of_unequal_length_end_each_by_itself(model: Transformer) -> None:
    padded, mask = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    alone = [model.generate(p, 20, temperature=0)[0, p.shape[1] :].tolist() for p in (padded[:1, 2:], padded[1:])]
    end = alone[0][5]
    got = torch.stack(list(stream(model, padded, 20, mask_BS=mask, temperature=0, eos_id=end)), 1).tolist()
    assert got == [cut(row, {end}, len(got[0])) for row in alone]
