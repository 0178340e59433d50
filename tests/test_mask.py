"""The token mask: padding is as if it were not there, wherever it stands.

B batch, S sequence, V vocabulary. Text with padding is held against each text alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe.generate import stream
from moe.kernels.loss import IGNORE_INDEX
from moe.layers import KVCache
from moe.model import Transformer
from tests.conftest import rel, tiny_config

V = 61
LENGTHS = (9, 4, 1)


@pytest.fixture(params=["left", "right", "between"])
def padded(request: pytest.FixtureRequest) -> tuple[list[Tensor], Tensor, Tensor]:
    """Texts, and the batch [3, 12] that holds them with its mask."""
    g = torch.Generator().manual_seed(5)
    texts = [torch.randint(V, (n,), generator=g) for n in LENGTHS]
    tokens, mask = torch.randint(V, (3, 12), generator=g), torch.zeros(3, 12, dtype=torch.bool)
    for row, text in enumerate(texts):
        places = {
            "left": torch.arange(12 - len(text), 12),
            "right": torch.arange(len(text)),
            "between": torch.randperm(12, generator=g)[: len(text)].sort().values,
        }[request.param]
        tokens[row, places], mask[row, places] = text, True
    return texts, tokens, mask


def model_of(**changes: Any) -> Transformer:
    return Transformer(tiny_config(**changes), seed=3).double()


def test_logits_are_those_of_each_text_alone(padded):
    texts, tokens, mask = padded
    model = model_of()
    logits = model(tokens, mask_BS=mask).logits_BSV
    for row, text in enumerate(texts):
        assert rel(logits[row, mask[row]], model(text[None]).logits_BSV[0]) < 1e-12


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_losses_counts_and_gradients_are_those_of_the_texts(padded, mode):
    texts, tokens, mask = padded
    model = model_of()
    model.activation_checkpointing = mode
    targets = torch.randint(V, tokens.shape, generator=torch.Generator().manual_seed(1))
    out = model(tokens, targets, mask_BS=mask)
    out.loss.backward()
    gradients: Any = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    alone: Any = [model(text[None], targets[row, mask[row]][None]) for row, text in enumerate(texts)]
    n = sum(LENGTHS)
    lm: Any = sum(one.losses["lm"] * size for one, size in zip(alone, LENGTHS, strict=True)) / n
    balance: Any = sum(one.losses["balance"] for one in alone) / len(texts)
    z: Any = sum(one.losses["z"] * size for one, size in zip(alone, LENGTHS, strict=True)) / n
    for name, want in {"lm": lm, "balance": balance, "z": z}.items():
        assert rel(out.losses[name], want) < 1e-12
    router = model.cfg.router
    (lm + router.balance_loss * balance + router.z_loss * z).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert rel(gradients[name], p.grad) < 1e-11, name
    for layer, routing in enumerate(out.routing):
        assert torch.equal(routing.counts_E, torch.stack([one.routing[layer].counts_E for one in alone]).sum(0))
        assert routing.counts_E.sum() == n * model.cfg.experts.top_k


def test_documents_are_those_of_the_text(padded):
    texts, tokens, mask = padded
    model = model_of()
    numbers = torch.arange(9) // 3
    documents = torch.full(tokens.shape, 7)
    for row, text in enumerate(texts):
        documents[row, mask[row]] = numbers[: len(text)]
    logits = model(tokens, mask_BS=mask, documents_BS=documents).logits_BSV
    for row, text in enumerate(texts):
        alone = model(text[None], documents_BS=numbers[None, : len(text)]).logits_BSV[0]
        assert rel(logits[row, mask[row]], alone) < 1e-12


@pytest.mark.parametrize("fused", [True, False])
def test_prompts_of_unequal_length_are_continued_as_each_alone(padded, fused):
    texts, tokens, mask = padded
    model = Transformer(tiny_config(max_seq_len=32), seed=3)
    if fused:
        new = torch.stack(list(stream(model, tokens, 8, temperature=0, mask_BS=mask)), 1)
    else:
        new = model.generate(tokens, 8, temperature=0, mask_BS=mask.long())[:, tokens.shape[1] :]
    for row, text in enumerate(texts):
        alone = torch.cat(list(stream(model, text[None], 8, temperature=0)))
        assert new[row].tolist() == alone.tolist()


def test_padded_prompts_under_autocast(padded):
    _, tokens, mask = padded
    model = Transformer(tiny_config(max_seq_len=32), seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = torch.stack(list(stream(model, tokens, 4, temperature=0, mask_BS=mask)), 1)
        assert torch.equal(model.generate(tokens, 4, temperature=0, mask_BS=mask)[:, tokens.shape[1] :], new)


def test_padding_takes_no_room_from_what_is_generated():
    model = Transformer(tiny_config(max_seq_len=12), seed=3)
    tokens, mask = torch.randint(V, (2, 10)), torch.ones(2, 10, dtype=torch.bool)
    mask[:, :5] = False
    new = torch.stack(list(stream(model, tokens, 20, temperature=0, mask_BS=mask)), 1)
    assert new.shape == (2, 8)
    assert torch.equal(model.generate(tokens, 20, temperature=0, mask_BS=mask)[:, 10:], new)
    assert torch.equal(model.generate(tokens[:, 5:], 20, temperature=0)[:, 5:], new)


def test_a_mask_with_a_cache_that_holds_earlier_tokens(padded):
    texts, tokens, mask = padded
    model = model_of(max_seq_len=64)
    cache = KVCache(model.cfg, 3, 40, torch.float64, "cpu")
    before = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(8))
    model(before, cache=cache)
    for _ in range(2):
        logits = model(tokens, mask_BS=mask, cache=cache).logits_BSV
    assert cache.lengths == [5 + 2 * n for n in LENGTHS]
    for row, text in enumerate(texts):
        whole = torch.cat([before[row], text, text])[None]
        assert rel(logits[row, mask[row]], model(whole).logits_BSV[0, -len(text) :]) < 1e-12


@pytest.mark.parametrize("padded", ["between"], indirect=True)
def test_a_compiled_model_takes_a_mask(padded):
    _, tokens, mask = padded
    model = model_of()
    want = model(tokens, tokens, mask_BS=mask)
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(tokens, tokens, mask_BS=mask)
    assert rel(got.loss, want.loss) < 1e-12


def test_a_sequence_of_padding_alone_changes_nothing(padded):
    _, tokens, mask = padded
    model = model_of()
    want = model(tokens, tokens, mask_BS=mask)
    more = torch.cat([tokens, tokens[:1]]), torch.cat([mask, torch.zeros_like(mask[:1])])
    got = model(more[0], more[0], mask_BS=more[1])
    assert rel(got.loss, want.loss) < 1e-12
    for one, other in zip(got.routing, want.routing, strict=True):
        assert torch.equal(one.counts_E, other.counts_E)


def test_what_is_no_mask_is_refused():
    model = model_of()
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mask \[2, 3\] must have the shape of the tokens \[2, 4\]"):
        model(tokens, mask_BS=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask of torch\.float32: must be bool, or integers"):
        model(tokens, mask_BS=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        model.generate(tokens, 1, mask_BS=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


@pytest.mark.parametrize(("B", "S"), [(0, 3), (2, 0), (0, 0)])
def test_no_sequences_and_empty_ones_have_finite_losses(B, S):
    model = model_of()
    tokens = torch.zeros(B, S, dtype=torch.int64)
    for targets in (None, tokens):
        for mask in (None, torch.ones(B, S, dtype=torch.bool)):
            out: Any = model(tokens, targets, mask_BS=mask)
            assert all(value == 0 for value in out.losses.values())
            assert [r.counts_E.sum() for r in out.routing] == [0] * len(out.routing)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_targets_outside_the_vocabulary_are_named():
    model = model_of()
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert model(tokens, torch.tensor([[IGNORE_INDEX] * 3])).losses["lm"] == 0
    for bad in (V, -1):
        with pytest.raises(ValueError, match=f"target id {bad} is outside the vocabulary of 61 ids"):
            model(tokens, torch.tensor([[0, bad, IGNORE_INDEX]]))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"tokens_BS": torch.zeros(3)}, r"tokens of torch\.float32: must be int64, as tokens\.long\(\) gives"),
        ({"tokens_BS": torch.zeros(1, 3, dtype=torch.uint8)}, r"tokens of torch\.uint8"),
        ({"tokens_BS": torch.zeros(3, dtype=torch.int64)}, r"tokens \[3\] must be \[B, S\]"),
        ({"tokens_BS": [[1, 2, 3]]}, "tokens of type list: must be a tensor of int64"),
        ({"targets_BS": torch.zeros(1, 3, dtype=torch.int32)}, r"targets of torch\.int32"),
        ({"documents_BS": torch.zeros(1, 3)}, r"documents of torch\.float32"),
        ({"mask_BS": [[1, 1, 0]]}, "mask of type list: must be a tensor"),
    ],
)
def test_inputs_of_other_kinds_are_named(given, complaint):
    inputs: Any = {"tokens_BS": torch.zeros(1, 3, dtype=torch.int64), **given}
    with pytest.raises(ValueError, match=complaint):
        model_of()(**inputs)
    if "tokens_BS" in given:
        with pytest.raises(ValueError, match="prompt"):
            model_of().generate(given["tokens_BS"], 2)


def test_no_prompts_have_no_continuations():
    model = Transformer(tiny_config())
    none = torch.zeros(0, 3, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        assert model.generate(none, 4, temperature=temperature).shape == (0, 7)
        assert [next_B.shape for next_B in stream(model, none, 4, temperature=temperature)] == [(0,)] * 4
