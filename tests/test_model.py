"""moe.model: loss, cache, checkpointing, compilation, autocast, parts, documents; what is refused."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moe.config import Config, RopeConfig, RouterConfig
from moe.layers import KVCache, document_runs
from moe.model import Counts, Sums, Transformer, objective
from tests.conftest import gradients, rel, tiny_config, tokens


def lively(cfg: Config, dtype: torch.dtype = torch.float64) -> Transformer:
    """A model whose every part matters to the output: larger weights than the first ones, norms that are not 1."""
    model = Transformer(cfg).to(dtype)
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(dtype)
        p.data = 1 + 0.3 * noise if name.endswith("norm.weight") else noise / p.shape[-1] ** 0.5
    return model


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_loss_is_the_cross_entropy_of_the_logits_plus_the_routers(ignored: float) -> None:
    cfg = tiny_config(router=RouterConfig(balance_loss=0.3, z_loss=0.05))
    model, x, targets = lively(cfg), tokens(), tokens(seed=1)
    targets = targets.masked_fill(torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < ignored, -100)
    out, plain = model(x, targets), model(x)
    assert out.logits_BSV is None
    assert plain.loss is None
    assert rel(out.losses["lm"], F.cross_entropy(plain.logits_BSV.flatten(0, 1), targets.flatten())) < 1e-13
    balance = torch.stack([r.balance_B.mean() for r in out.routing]).mean()
    z = torch.stack([r.z_T.mean() for r in out.routing]).mean()
    assert len(out.routing) == cfg.n_layers
    assert rel(out.losses["balance"], balance) < 1e-14
    assert rel(out.losses["z"], z) < 1e-14
    assert rel(out.loss, out.losses["lm"] + 0.3 * balance + 0.05 * z) < 1e-14


@pytest.mark.parametrize("name", ["balance_loss", "z_loss"])
def test_router_loss_weights_change_the_gradient(name: str) -> None:
    x, targets, grads = tokens(), tokens(seed=1), []
    for weight in (0.0, 0.5):
        model = lively(tiny_config(router=RouterConfig(**{"balance_loss": 0.0, "z_loss": 0.0, name: weight})))
        grads.append(gradients(model, model(x, targets).loss)["blocks.0.moe.router.weight"])
    assert rel(grads[1], grads[0]) > 1e-3


def test_without_any_target_the_loss_is_the_routers_alone() -> None:
    model = lively(tiny_config())
    out = model(tokens(), torch.full((3, 16), -100))
    assert out.losses["lm"].item() == 0
    assert all(g.isfinite().all() for g in gradients(model, out.loss).values())


def test_gradients_equal_those_through_the_logits() -> None:
    model, x, targets = lively(tiny_config(router=RouterConfig(0.0, 0.0))), tokens(), tokens(seed=1)
    got = gradients(model, model(x, targets).loss)
    want = gradients(model, F.cross_entropy(model(x).logits_BSV.flatten(0, 1), targets.flatten()))
    for name in want:
        assert rel(got[name], want[name]) < 1e-12, name


def test_first_loss_is_that_of_guessing() -> None:
    loss = Transformer(tiny_config())(tokens(8, 32), tokens(8, 32, seed=1)).losses["lm"].item()
    assert loss == pytest.approx(math.log(61), abs=0.3)


# -------------------------------------------------------------------------------------------------------------- cache

CHUNKS = [[16], [1] * 16, [5, 11], [7, 1, 1, 4, 3]]


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_logits_do_not_depend_on_the_cache(
    n_kv_heads: int, dtype: torch.dtype, tolerance: float, chunks: list[int]
) -> None:
    cfg = tiny_config(n_kv_heads)
    model, x = lively(cfg, dtype), tokens()
    cache, parts = KVCache(cfg, 3, 20, dtype, "cpu"), []
    with torch.no_grad():
        for part in x.split(chunks, dim=1):
            parts.append(model(part, cache=cache).logits_BSV)
        assert cache.length == 16
        assert rel(torch.cat(parts, 1), model(x).logits_BSV) < tolerance


@pytest.mark.parametrize("scaling", ["linear", "yarn"])
def test_cache_with_scaled_rope(scaling: Any) -> None:
    cfg = tiny_config()
    rope = RopeConfig(scaling=scaling, factor=4.0, original_max_seq_len=10)
    cfg = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, rope=rope))
    model, x, cache = lively(cfg), tokens(), KVCache(cfg, 3, 16, torch.float64, "cpu")
    with torch.no_grad():
        parts = [model(part, cache=cache).logits_BSV for part in x.split([9, 1, 6], dim=1)]
        assert rel(torch.cat(parts, 1), model(x).logits_BSV) < 1e-12
        assert rel(lively(tiny_config())(x).logits_BSV, model(x).logits_BSV) > 1e-2, "the scaling has an effect"


def test_later_tokens_leave_earlier_logits_alone() -> None:
    model, x = lively(tiny_config()), tokens()
    changed = x.clone()
    changed[:, 10:] = (x[:, 10:] + 1) % 61
    before, after = model(x).logits_BSV, model(changed).logits_BSV
    assert rel(after[:, :10], before[:, :10]) < 1e-13
    assert rel(after[:, 10:], before[:, 10:]) > 0.1


def test_too_long() -> None:
    cfg = tiny_config()
    model = Transformer(cfg)
    assert model(tokens(1, 40)).logits_BSV.shape == (1, 40, 61)
    with pytest.raises(ValueError, match=r"sequence of 41 tokens, but max_seq_len = 40 \(tiny\)"):
        model(tokens(1, 41))
    cache = KVCache(cfg, 1, 8, torch.float32, "cpu")
    model(tokens(1, 6), cache=cache)
    with pytest.raises(ValueError, match="sequence of 9 tokens, but the cache was made for 8"):
        model(tokens(1, 3), cache=cache)


# --------------------------------------------------------------------------------- checkpointing, compilation, autocast


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_does_not_bypass_the_cache(mode: str) -> None:
    cfg = tiny_config()
    model, x, cache = lively(cfg), tokens(), KVCache(cfg, 3, 16, torch.float64, "cpu")
    model.activation_checkpointing = mode  # gradients are on here, as they are by default
    parts = [model(part, cache=cache).logits_BSV for part in x.split([9, 7], dim=1)]
    assert rel(torch.cat(parts, 1), model(x).logits_BSV) < 1e-12


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(backend: str) -> None:
    model, x, targets = lively(tiny_config(n_layers=1), torch.float32), tokens(), tokens(seed=1)
    want = gradients(model, model(x, targets).loss)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(x, targets)
    got = gradients(model, out.loss)
    assert rel(out.loss, model(x, targets).loss) < 1e-6
    for name in want:
        assert rel(got[name], want[name]) < 1e-4, name


def test_bfloat16_autocast_stays_near_float32() -> None:
    model, x, targets = Transformer(tiny_config()), tokens(8, 32), tokens(8, 32, seed=1)
    want_loss = model(x, targets).loss
    want = gradients(model, want_loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, targets)
        assert model(x).logits_BSV.dtype == torch.bfloat16
    got = gradients(model, out.loss)
    assert out.loss.dtype == torch.float32
    assert rel(out.loss, want_loss) < 5e-3
    assert all(g.dtype == torch.float32 for g in got.values())
    # Rounding sends a few tokens to another expert, hence more than bfloat16's own 0.4%.
    assert rel(got["head.weight"], want["head.weight"]) < 0.1


# --------------------------------------------------------------------------------------------------------------- parts


def part(model: Transformer, layers: range) -> Transformer:
    """A pipeline stage: some of the layers, and what stands at its end of the model."""
    stage = copy.deepcopy(model)
    for i in range(len(stage.blocks)):
        if i not in layers:
            stage.blocks[i] = None  # type: ignore[assignment]
    if 0 not in layers:
        stage.embedding = None  # type: ignore[assignment]
    if len(stage.blocks) - 1 not in layers:
        stage.norm = stage.head = None  # type: ignore[assignment]
    return stage


def test_parts_one_after_the_other_are_the_whole_model() -> None:
    """Names stay, hidden states pass from part to part, and the sums of the parts make the objective of the whole."""
    cfg = tiny_config(n_layers=3, router=RouterConfig(balance_loss=0.3, z_loss=0.2))
    whole, x, targets = lively(cfg), tokens(), tokens(seed=1)
    parts: list[Any] = [part(whole, layers) for layers in (range(0, 1), range(1, 1), range(1, 3))]
    assert {name for p in parts for name, _ in p.named_parameters()} == {name for name, _ in whole.named_parameters()}
    logits: Any = parts[2](parts[1](parts[0](x).hidden_BSD).hidden_BSD).logits_BSV
    want_logits: Any = whole(x).logits_BSV
    assert rel(logits, want_logits) < 1e-14
    outs = [parts[0](x)]
    outs += [parts[1](outs[0].hidden_BSD)]
    outs += [parts[2](outs[1].hidden_BSD, targets)]
    assert [len(out.routing) for out in outs] == [1, 0, 2]
    assert outs[0].loss is None
    want = whole(x, targets)
    # A part's router sums are means over its own layers.
    balance = (outs[0].sums.balance + 2 * outs[2].sums.balance) / 3
    z = (outs[0].sums.z + 2 * outs[2].sums.z) / 3
    sums = Sums(outs[2].sums.lm, balance, z)
    loss = objective(cfg.router, sums, Counts(int(want.counts.targets), 3, 48))
    assert want.loss is not None
    assert rel(loss, want.loss) < 1e-14
    whole_gradients = gradients(whole, want.loss)
    loss.backward()
    for p in parts:
        for name, parameter in p.named_parameters():
            assert parameter.grad is not None
            assert rel(parameter.grad, whole_gradients[name]) < 1e-12, name


def test_parts_of_a_batch_add_up_to_its_objective() -> None:
    """Sums of micro-batches over the counts of all: loss and gradients of one pass, however the targets are spread."""
    model, x, targets = lively(tiny_config(router=RouterConfig(0.3, 0.2))), tokens(4), tokens(4, seed=1)
    targets[0, 3:], targets[1] = -100, -100
    want = model(x, targets)
    whole = gradients(model, want.loss)
    counts = Counts(int((targets != -100).sum()), 4, 64)
    halves = (slice(0, 1), slice(1, 4))
    parts = [objective(model.cfg.router, model(x[rows], targets[rows]).sums, counts) for rows in halves]
    assert want.loss is not None
    assert rel(torch.stack(parts).sum(), want.loss) < 1e-14
    got = gradients(model, torch.stack(parts).sum())
    assert all(rel(got[name], whole[name]) < 1e-12 for name in whole)


# ---------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize(
    ("tokens", "targets", "cache", "words"),
    [
        (torch.tensor([[3, 99]]), None, False, ["token id 99", "vocabulary of 50"]),
        (torch.tensor([[3, -1]]), None, False, ["token id -1", "vocabulary of 50"]),
        (torch.tensor([[3, 4]]), torch.tensor([[4]]), False, ["targets [1, 1]", "tokens [1, 2]"]),
        (torch.tensor([[3, 4]]), torch.tensor([[4, 5]]), True, ["exclude each other"]),
        (torch.tensor([[3], [4]]), None, True, ["batch of 2", "made for 1"]),
    ],
)
def test_bad_input_is_named(tokens, targets, cache, words) -> None:
    model = Transformer(tiny_config(vocab_size=50))
    kv = KVCache(model.cfg, 1, 8, torch.float32, "cpu") if cache else None
    with pytest.raises(ValueError) as error:
        model(tokens, targets, cache=kv)
    assert all(word in str(error.value) for word in words)


def test_no_token_sees_another_document() -> None:
    """With document ids: each document's logits are those it has alone, and nothing of it reaches another."""
    model, x = lively(tiny_config()), tokens(B=2, S=16)
    lengths = [[4, 1, 11], [7, 9]]
    ids = [[0, 1, 0], [5, 4]]  # an id that comes again is of another document
    documents = torch.stack(
        [torch.tensor(i).repeat_interleave(torch.tensor(n)) for i, n in zip(ids, lengths, strict=True)]
    )
    logits = model(x, documents_BS=documents).logits_BSV
    for b, row in enumerate(lengths):
        begin = 0
        for n in row:
            alone = model(x[b : b + 1, begin : begin + n]).logits_BSV[0]
            assert rel(logits[b, begin : begin + n], alone) < 1e-12  # rotations are relative
            begin += n
    whole = model(x).logits_BSV
    assert rel(whole[0, :4], logits[0, :4]) < 1e-13
    assert rel(whole[0, 4:], logits[0, 4:]) > 1e-2

    embedded = model.embedding(x).detach().requires_grad_()
    model.embedding.forward = lambda _: embedded  # type: ignore[method-assign]
    model(x, documents_BS=documents).logits_BSV[0, 4:].sum().backward()
    assert embedded.grad is not None
    assert embedded.grad[0, :4].abs().max() == 0
    assert embedded.grad[0, 4:].abs().amax(1).min() > 0


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_documents_as_runs_and_as_a_mask_are_the_same(mode: str, monkeypatch) -> None:
    """torch.compile takes the mask, everything else the runs; logits and gradients, under any checkpointing."""
    model, x = lively(tiny_config()), tokens(B=3, S=16)
    model.activation_checkpointing = mode
    documents = torch.zeros(3, 16, dtype=torch.int64)  # the first window is one document
    documents[1, 8:], documents[2, 3:], documents[2, 15:] = 1, 1, 2
    assert document_runs(documents) == [(1, 16), (2, 8), (1, 3), (1, 12), (1, 1)]
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        logits = model(x, documents_BS=documents).logits_BSV
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for one, other in zip(*found, strict=True):
        assert rel(one, other) < 1e-12


@pytest.mark.parametrize("parts", [None, 5])
def test_memory_grows_with_the_context_not_with_its_square(parts: int | None, tmp_path: Path) -> None:
    """Bytes at the peak of a forward and backward pass, of one document or of several in a window."""
    model, peaks = Transformer(tiny_config(max_seq_len=8192)), []
    for length in (2048, 4096, 8192):
        documents = None if parts is None else (torch.arange(length) * parts // length).unsqueeze(0)
        x = tokens(B=1, S=length)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(x, x, documents_BS=documents).loss.backward()
        model.zero_grad(set_to_none=True)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        held = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
        peaks.append(max(held) - held[0])
    assert peaks[0] > 2048 * model.cfg.d_model * 4  # the profiler saw the activations
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.05)


def test_documents_that_cannot_be() -> None:
    model, x = lively(tiny_config()), tokens(B=1, S=4)
    with pytest.raises(ValueError, match=r"documents \[1, 3\] must have the shape of the tokens \[1, 4\]"):
        model(x, documents_BS=x[:, :3])
    cache = KVCache(model.cfg, 1, 8, torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match="documents and cache exclude each other"):
        model(x, documents_BS=x, cache=cache)
