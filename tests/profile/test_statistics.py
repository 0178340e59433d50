"""Routing statistics against brute-force counts, on our models and on transformers'."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe
from moe.errors import NotObservable
from moe.profile import (
    RoutingProfile,
    Trace,
    closest_pairs,
    compare,
    expert_similarity,
    observe,
    record,
    routing,
    tables,
)
from moe.profile.observe import Pass
from tests.conftest import rel, tiny_config
from tests.hf_models import MODELS, build

E, K, V = 6, 2, 40


def random_pass(L: int, B: int, S: int, seed: int, skew: float = 0.0) -> Pass:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(L, B * S, E, generator=g) + skew * torch.arange(E)
    weights, ids = (t.contiguous() for t in logits.topk(K))
    return Pass(ids, weights.softmax(-1), logits, (B, S), torch.randint(V, (B * S,), generator=g))


@pytest.fixture(scope="module")
def passes() -> list[Pass]:
    return [random_pass(3, B, S, seed, 0.3) for seed, (B, S) in enumerate([(2, 7), (1, 12), (3, 4), (1, 1)])]


@pytest.fixture(scope="module")
def profile(passes: list[Pass]) -> RoutingProfile:
    found = RoutingProfile(E, V)
    for p in passes:
        found.update(p)
    return found


def tokens_of(passes: list[Pass], layer: int) -> list[tuple[list[int], list[float], list[float], int]]:
    """(ids, weights, logits, token id) of each token of a layer."""
    return [
        (p.ids_LTK[layer, t].tolist(), p.weights_LTK[layer, t].tolist(), p.logits_LTE[layer, t].tolist(), int(token))
        for p in passes
        for t, token in enumerate(p.tokens_T)  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("layer", range(3))
def test_counts_are_brute_force_counts(passes: list[Pass], profile: RoutingProfile, layer: int) -> None:
    tokens = tokens_of(passes, layer)
    n = len(tokens)
    assert profile.tokens == n
    counts = Counter(e for ids, *_ in tokens for e in ids)
    assert profile.counts_LE[layer].tolist() == [counts[e] for e in range(E)]
    first = Counter(ids[0] for ids, *_ in tokens)
    assert profile.first_counts_LE[layer].tolist() == [first[e] for e in range(E)]
    together = Counter((a, b) for ids, *_ in tokens for a in ids for b in ids)
    assert profile.coactivation_LEE[layer].tolist() == [[together[a, b] for b in range(E)] for a in range(E)]
    load = [counts[e] / (n * K) for e in range(E)]
    mean = 1 / E
    assert profile.load_LE[layer].tolist() == pytest.approx(load)
    entropy = -sum(p * math.log(p) for p in load if p) / math.log(E)
    assert float(profile.load_entropy_L[layer]) == pytest.approx(entropy)
    cv = (sum((p - mean) ** 2 for p in load) / E) ** 0.5 / mean
    assert float(profile.load_cv_L[layer]) == pytest.approx(cv)
    assert float(profile.max_over_mean_L[layer]) == pytest.approx(max(load) / mean)
    others = [(a, b) for a in range(E) for b in range(E) if a != b]
    all_pairs, all_products = sum(together[p] for p in others), sum(counts[a] * counts[b] for a, b in others)
    for a, b in others:
        lift = together[a, b] / all_pairs / (counts[a] * counts[b] / all_products)
        assert float(profile.coactivation_lift_LEE[layer, a, b]) == pytest.approx(lift)
    weight = sum(w for ids, ws, *_ in tokens for e, w in zip(ids, ws, strict=True) if e == 5) / counts[5]
    assert float(profile.weight_LE[layer, 5]) == pytest.approx(weight, rel=1e-6)
    words = Counter((e, token) for ids, _, _, token in tokens for e in ids)
    assert profile.token_counts_LEV[layer].tolist() == [[words[e, v] for v in range(V)] for e in range(E)]


@pytest.mark.parametrize("layer", range(3))
def test_the_routers_confidence(passes: list[Pass], profile: RoutingProfile, layer: int) -> None:
    entropies, tops, weights = [], [], []
    for _, ws, logits, _ in tokens_of(passes, layer):
        total = sum(math.exp(x) for x in logits)
        p = [math.exp(x) / total for x in logits]
        entropies.append(-sum(q * math.log(q) for q in p))
        tops.append(max(p))
        weights.append(ws[0])
    n = profile.tokens
    assert float(profile.router_entropy_L[layer]) == pytest.approx(sum(entropies) / n, rel=1e-6)
    assert float(profile.top_probability_L[layer]) == pytest.approx(sum(tops) / n, rel=1e-6)
    assert float(profile.top_weight_L[layer]) == pytest.approx(sum(weights) / n, rel=1e-6)


@pytest.mark.parametrize("layer", range(3))
def test_per_pass_figures(passes: list[Pass], profile: RoutingProfile, layer: int) -> None:
    ratios, pairs, repeats = [], 0, 0
    dropped = dict.fromkeys(profile.capacity_factors, 0)
    for p in passes:
        B, S = p.shape
        ids = p.ids_LTK[layer].tolist()
        counts = Counter(e for row in ids for e in row)
        ratios.append(max(counts.values()) * E / (B * S * K))
        for factor in dropped:
            dropped[factor] += sum(max(0, c - math.ceil(factor * B * S * K / E)) for c in counts.values())
        for b in range(B):
            for s in range(1, S):
                pairs += 1
                repeats += ids[b * S + s][0] == ids[b * S + s - 1][0]
    assert float(profile.pass_max_over_mean_L[layer]) == pytest.approx(sum(ratios) / len(passes))
    for factor, n in dropped.items():
        assert float(profile.drop_rate_L(factor)[layer]) == pytest.approx(n / (profile.tokens * K))
    assert dropped[1.0] > 0
    assert float(profile.repeat_rate_L[layer]) == pytest.approx(repeats / pairs)
    first = Counter(ids[0] for ids, *_ in tokens_of(passes, layer))
    expected = sum((n / profile.tokens) ** 2 for n in first.values())
    assert float(profile.expected_repeat_rate_L[layer]) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"capacity_factor = 3: was not counted; counted were 1, 1.25, 1.5, 2"):
        profile.drop_rate_L(3)


def test_neighbouring_layers(passes: list[Pass], profile: RoutingProfile) -> None:
    chosen = [p.ids_LTK[:2, :, 0].T.tolist() for p in passes]
    pairs = Counter((a, b) for rows in chosen for a, b in rows)
    assert profile.next_layer_counts[0].tolist() == [[pairs[a, b] for b in range(E)] for a in range(E)]
    # The second layer chooses what the first chose, the third at random: all of the information, and next to none.
    g = torch.Generator().manual_seed(0)
    one, other = torch.randint(E, (2, 20000, 1), generator=g)
    ids = torch.stack([one, (one + 1) % E, other])
    told = RoutingProfile(E)
    told.update(Pass(ids, torch.ones(ids.shape), torch.zeros(3, 20000, E), (1, 20000), None))
    assert float(told.next_layer_information[0]) == pytest.approx(1.0)
    assert 0 <= float(told.next_layer_information[1]) < 0.002


def test_sources_have_shares_and_errors() -> None:
    """Against numpy-free arithmetic, and a difference put there by hand."""
    profile = RoutingProfile(E)
    shares: dict[str, list[float]] = {"text": [], "code": []}
    for seed in range(30):
        source, skew = ("text", 0.0) if seed % 2 else ("code", 0.5)
        p = random_pass(1, 2, 50, seed, skew)
        profile.source = source
        profile.update(p)
        shares[source] += [float((p.ids_LTK[0].view(2, -1)[b] == 5).sum()) / (50 * K) for b in range(2)]
    for source, values in shares.items():
        found, mean = profile.sources[source], sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        assert found.sequences == len(values)
        assert float(found.mean_LE[0, 5]) == pytest.approx(mean)
        assert float(found.error_LE[0, 5]) == pytest.approx((variance / len(values)) ** 0.5)
    difference, z = profile.specialisation("code", "text")
    assert float(difference[0, 5]) > 0.05
    assert float(z[0, 5]) > 4
    assert float(difference.sum()) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="source 'poems': not profiled; there are code, text"):
        profile.specialisation("code", "poems")


def test_load_over_time_keeps_every_pass_in_few_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.profile.statistics.MAX_SPANS", 8)
    profile = RoutingProfile(E)
    passes = [random_pass(2, 1, 5, seed) for seed in range(53)]
    for p in passes:
        profile.update(p)
    n, load_NLE = profile.load_over_time
    assert len(n) <= 8
    assert int(n.sum()) == 53
    begin = 0
    for span, load_LE in zip(n.tolist(), load_NLE, strict=True):
        ids = torch.cat([p.ids_LTK for p in passes[begin : begin + span]], 1).flatten(1)
        want = torch.stack([torch.bincount(row, minlength=E) for row in ids]).double()
        assert rel(load_LE, want / want.sum(1, keepdim=True)) < 1e-12
        begin += span


def test_top_tokens_and_dead_experts() -> None:
    """Expert 3 reads token 7 and nothing else; expert 5 nothing at all."""
    tokens = torch.arange(200) % 10
    ids = torch.where(tokens == 7, 3, tokens % 3)[None, :, None]
    profile = RoutingProfile(E, V)
    profile.update(Pass(ids, torch.ones(ids.shape), torch.zeros(1, 200, E), (4, 50), tokens))
    assert profile.top_tokens(0, 3) == [(7, pytest.approx(10.0))]
    assert profile.dead_experts() == [(0, 4), (0, 5)]


@pytest.mark.parametrize("at_least", [1, 3])
def test_top_tokens_by_the_formula(passes: list[Pass], profile: RoutingProfile, at_least: int) -> None:
    """Two experts per token: lift = P(expert | token) / P(expert), both over tokens, not over routed rows."""
    for layer in range(3):
        tokens = tokens_of(passes, layer)
        seen = Counter(token for *_, token in tokens)
        for e in range(E):
            served = Counter(token for ids, *_, token in tokens if e in ids)
            share = sum(served.values()) / len(tokens)
            lift = {v: n / seen[v] / share for v, n in served.items() if seen[v] >= at_least}
            got = profile.top_tokens(layer, e, n=V, at_least=at_least)
            assert dict(got) == {v: pytest.approx(x) for v, x in lift.items()}
            falling = [x for _, x in got]
            assert falling == sorted(falling, reverse=True)
            assert [x for _, x in profile.top_tokens(layer, e, n=2, at_least=at_least)] == falling[:2]


def test_token_classes_are_counted_up_to_a_limit(passes: list[Pass], monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, counted in ((3 * E * V, True), (3 * E * V - 1, False)):
        monkeypatch.setattr("moe.profile.statistics.MAX_TOKEN_COUNTS", limit)
        profile = RoutingProfile(E, V)
        profile.update(passes[0])
        if counted:
            assert int(profile.token_counts_LEV.sum()) == 3 * profile.tokens * K
        else:
            with pytest.raises(ValueError, match="tokens were not counted: give vocab_size"):
                _ = profile.token_counts_LEV


def test_top_tokens_that_are_equal_come_in_the_order_of_their_ids() -> None:
    """With many equals, an unstable choice shuffles them."""
    tokens = torch.arange(2000) % 200
    ids = (tokens % 2)[None, :, None]
    profile = RoutingProfile(2, 200)
    profile.update(Pass(ids, torch.ones(ids.shape), torch.zeros(1, 2000, 2), (4, 500), tokens))
    for e in (0, 1):
        assert [i for i, _ in profile.top_tokens(0, e, n=60)] == list(range(e, 120, 2))
        assert len(profile.top_tokens(0, e, n=1000)) == 100


def test_ids_outside_the_given_vocabulary_are_no_other_tokens(passes: list[Pass]) -> None:
    profile = RoutingProfile(E, V - 5)
    for p in passes:
        profile.update(p)
    outside = sum(int((p.tokens_T >= V - 5).sum()) for p in passes if p.tokens_T is not None)
    with pytest.raises(ValueError, match=rf"vocab_size = {V - 5}: {outside} tokens have other ids"):
        _ = profile.token_counts_LEV


FIGURES = ["counts_LE", "first_counts_LE", "coactivation_LEE", "next_layer_counts", "token_counts_LEV", "load_LE"]
FIGURES += ["router_entropy_L", "top_probability_L", "weight_LE", "repeat_rate_L", "load_entropy_L", "load_cv_L"]
FIGURES += ["max_over_mean_L", "pass_max_over_mean_L", "next_layer_information", "coactivation_lift_LEE"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "around",
    [
        *(partial(default_dtype, dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16)),
        partial(torch.autocast, "cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        deterministic,
        partial(torch.device, "meta"),
    ],
)
def test_the_same_figures_whatever_is_in_force_around(around: Any) -> None:
    """Also where it changes from pass to pass, and with more than 256 tokens an expert: bfloat16 counts no further."""
    passes = [random_pass(3, 3, 700, seed, 0.3) for seed in range(3)]
    want, got = RoutingProfile(E, V), RoutingProfile(E, V)
    for i, p in enumerate(passes):
        want.source = got.source = "text" if i else "code"
        want.update(p)
        with around() if i < 2 else nullcontext():
            tokens = p.tokens_T.to(torch.int32) if p.tokens_T is not None else None
            # Tensors of inference mode, where that is what is in force.
            ids, weights, logits = (t.clone() for t in (p.ids_LTK, p.weights_LTK, p.logits_LTE))
            got.update(Pass(ids, weights, logits, p.shape, tokens))
    for name in FIGURES:
        with around():
            found = getattr(got, name)
        assert found.dtype == getattr(want, name).dtype
        assert torch.equal(found.nan_to_num(-1), getattr(want, name).nan_to_num(-1)), name
    assert torch.equal(got.drop_rate_L(1.25), want.drop_rate_L(1.25))
    with around():
        assert got.load_over_time[0].tolist() == [1, 1, 1]
        found = got.specialisation("code", "text")
    assert all(torch.equal(a, b) for a, b in zip(found, want.specialisation("code", "text"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_under_another_default_dtype_and_autocast(dtype: torch.dtype, tmp_path: Path) -> None:
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=64, max_seq_len=32)
    with default_dtype(dtype):
        model = moe.Transformer(cfg)
        with routing(model, 64) as p, record(model, tmp_path / "t"), torch.autocast("cpu", torch.bfloat16):
            out = model(torch.arange(32)[None].to(torch.int64))
        assert p.counts_LE.tolist() == [r.counts_E.tolist() for r in out.routing]
        counts = Trace.open(tmp_path / "t").counts_PLE()
    assert counts[0].tolist() == p.counts_LE.tolist()


@pytest.mark.parametrize(("n_experts", "top_k", "n_layers"), [(1, 1, 1), (1, 1, 2), (3, 3, 1), (4, 4, 2)])
def test_models_with_nothing_to_choose(n_experts: int, top_k: int, n_layers: int) -> None:
    """One expert, all experts, one layer: figures that are numbers, and tables that say so."""
    profile = RoutingProfile(n_experts, V)
    for source, seed in (("text", 0), ("text", 1), ("code", 2)):
        g = torch.Generator().manual_seed(seed)
        logits = torch.randn(n_layers, 12, n_experts, generator=g)
        weights, ids = (t.contiguous() for t in logits.topk(top_k))
        profile.source = source
        tokens = torch.randint(V, (12,), generator=g)
        profile.update(Pass(ids, weights.softmax(-1), logits, (2, 6) if source == "text" else (1, 12), tokens))
    assert profile.load_entropy_L.tolist() == pytest.approx([1.0] * n_layers)
    assert profile.max_over_mean_L.tolist() == pytest.approx([1.0] * n_layers)
    difference, z = profile.specialisation("text", "code")
    assert difference.abs().max() == 0
    assert z.abs().max() == 0
    tables_ = [tables.by_layer(profile), *tables.sources(profile), tables.dropped(profile)]
    tables_.append(tables.top_tokens(profile, 0, str))
    assert "nan" not in str(tables_)
    json.dumps(tables.as_json(profile), allow_nan=False)


def test_duplicate_experts() -> None:
    """Against cosines of the joined weights; random experts are as close as chance has it, a scaled copy is not."""
    weights, others = torch.randn(E, 2, 30, 20), torch.randn(E, 20, 30)
    weights[4], others[4] = weights[1] * 2, others[1] * 2
    joined = torch.cat([weights.flatten(1), others.flatten(1)], 1)
    want = torch.stack([torch.cosine_similarity(row, joined) for row in joined])
    assert rel(expert_similarity(weights, others), want) < 1e-6
    model: Any = moe.Transformer(moe.load_config("replica-tiny").scaled(d_model=192, n_layers=3))
    with torch.no_grad():
        model.blocks[2].moe.experts.w_in_EGFD[7] = 0.5 * model.blocks[2].moe.experts.w_in_EGFD[2]
        model.blocks[2].moe.experts.w_out_EDF[7] = 0.5 * model.blocks[2].moe.experts.w_out_EDF[2]
    first, second, third = closest_pairs(model)
    for pair in (first, second):
        assert 0.6 < pair.cosine / pair.by_chance < 1.5
    assert (third.layer, third.one, third.other) == (2, 2, 7)
    assert third.cosine == pytest.approx(1.0)
    assert abs(third.median) < third.by_chance
    assert closest_pairs(torch.nn.Linear(2, 2)) == []


# ------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_our_model_in_training(checkpointing: str) -> None:
    """One pass per step, activation checkpointing's second run not counted; the same as the model's own report."""
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=3, vocab_size=64, max_seq_len=32)
    torch.manual_seed(0)
    model = moe.Transformer(cfg)
    model.activation_checkpointing = checkpointing
    tokens = torch.randint(64, (2, 17))
    with routing(model, 64) as p:
        for _ in range(2):
            out = model(tokens[:, :-1], tokens[:, 1:])
            out.loss.backward()
    assert p.passes == 2
    assert p.tokens == 2 * 32
    assert p.counts_LE.tolist() == [(2 * r.counts_E).tolist() for r in out.routing]
    assert int(p.token_counts_LEV.sum()) == 2 * 32 * 2 * 3
    model(tokens)
    assert p.passes == 2, "outside the block nothing is seen"


def own_logits(model: Any, tokens: Tensor) -> Tensor:
    """[L, T, E]: the router logits that the model itself gives when asked."""
    return torch.stack(model(tokens, output_router_logits=True).router_logits)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str) -> None:
    """The profile against statistics from the model's own router logits."""
    model = build(name)
    E, K = (getattr(model.config, n) for n in ("num_experts", "num_experts_per_tok"))
    tokens = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
    with routing(model, 97) as p, torch.no_grad():
        model(input_ids=tokens)
    logits = own_logits(model, tokens).detach()
    ids = logits.topk(K).indices
    counts = torch.stack([torch.bincount(row.flatten(), minlength=E) for row in ids])
    assert p.passes == 1
    assert torch.equal(p.counts_LE, counts)
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy().mean(1)
    assert rel(p.router_entropy_L, entropy) < 1e-6
    assert rel(p.top_probability_L, logits.double().softmax(-1).amax(-1).mean(1)) < 1e-6
    words = torch.zeros(2, E, 97, dtype=torch.int32)
    for layer, token in enumerate(tokens.flatten().expand(2, -1)):
        for t, v in enumerate(token):
            words[layer, ids[layer, t], v] += 1
    assert torch.equal(p.token_counts_LEV, words)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["ours", "Mixtral"])
def test_padding_is_not_profiled(name: str, side: str, tmp_path: Path) -> None:
    """Two texts of 30 and 4 tokens in a batch of 2 x 30: 34 tokens, whose figures are those of the texts alone."""
    model: Any = build(name) if name != "ours" else moe.Transformer(tiny_config(vocab_size=97))
    g = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, 97, (n,), generator=g) for n in (30, 4)]
    tokens, mask = torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 30, dtype=torch.int64)
    for row, text in enumerate(texts):
        at = slice(30 - len(text), 30) if side == "left" else slice(0, len(text))
        tokens[row, at], mask[row, at] = text, 1
    with torch.no_grad(), record(model, tmp_path / "padded"), routing(model, 97) as padded:
        padded.source = "it"
        if name == "ours":
            model(tokens, mask_BS=mask)
        else:
            model(input_ids=tokens, attention_mask=mask.float() if side == "left" else mask)
    with torch.no_grad(), record(model, tmp_path / "alone"), routing(model, 97) as alone:
        alone.source = "it"
        for text in texts:
            model(text[None])
    assert padded.tokens == alone.tokens == 34
    for figure in ("counts_LE", "first_counts_LE", "coactivation_LEE", "next_layer_counts", "token_counts_LEV"):
        assert torch.equal(getattr(padded, figure), getattr(alone, figure)), figure
    for figure in ("weight_LE", "router_entropy_L", "top_weight_L", "repeat_rate_L"):
        assert rel(getattr(padded, figure), getattr(alone, figure)) < 1e-5, figure
    assert padded.sources["it"].sequences == 2
    assert rel(padded.sources["it"].mean_LE, alone.sources["it"].mean_LE) < 1e-6
    difference = compare(Trace.open(tmp_path / "padded"), Trace.open(tmp_path / "alone"))
    assert difference.tokens == 34
    assert difference.moved_L.sum() == 0


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    model: Any = moe.Transformer(moe.load_config("replica-tiny"))
    first, second = torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)

    def stop(*_arguments: Any) -> None:
        raise KeyboardInterrupt

    with routing(model, 512) as p:
        handle = model.blocks[1].attention.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(first)  # the first layer's router has spoken
        handle.remove()
        out = model(second)
    assert (p.passes, p.tokens) == (1, 4)
    assert p.counts_LE.tolist() == [r.counts_E.tolist() for r in out.routing]
    assert p.token_counts_LEV[:, :, 1].sum() == p.counts_LE.sum()


def test_a_pass_without_token_ids_has_no_tokens_and_one_row() -> None:
    """Nor those of the call before it, of as many tokens."""
    model, seen = build("Mixtral"), []
    tokens = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(1))
    with observe.observe(model, seen.append), torch.no_grad():
        model(input_ids=tokens)
        model(inputs_embeds=model.get_input_embeddings()(tokens))
    with_ids, without = seen
    assert with_ids.shape == (2, 5)
    assert torch.equal(with_ids.tokens_T, tokens.flatten())
    assert (without.shape, without.tokens_T) == ((1, 10), None)
    assert torch.equal(without.ids_LTK, with_ids.ids_LTK)


def test_a_model_without_routers() -> None:
    with pytest.raises(NotObservable, match=r"Linear has no router that is known here"), routing(torch.nn.Linear(2, 2)):
        pass
    with pytest.warns(UserWarning, match="0 calls"), routing(moe.Transformer(moe.load_config("replica-tiny"))) as p:
        pass
    with pytest.raises(ValueError, match="nothing was profiled yet"):
        _ = p.counts_LE


def test_hooks_are_gone_after_an_error() -> None:
    model = moe.Transformer(moe.load_config("replica-tiny"))
    with pytest.raises(RuntimeError, match="stop"), routing(model):
        raise RuntimeError("stop")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
