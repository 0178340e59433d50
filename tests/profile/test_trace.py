"""The routing trace: what is read is what was chosen; replayed bit for bit; compared; imported; broken files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe.errors import InUseError, TraceError
from moe.profile import Recorder, Trace, compare, record, replay
from moe.profile.observe import Pass
from tests.hf_models import MODELS, build


def our_model(bias_rate: float = 0.0) -> Any:
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=64, max_seq_len=32)
    cfg = cfg.with_overrides([f"router.bias_update_rate={bias_rate}"])
    torch.manual_seed(0)
    model: Any = moe.Transformer(cfg)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.weight.normal_(0, 0.2)
            if bias_rate:
                block.moe.router.bias_E.normal_(0, 0.1)
    return model


TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def step(model: Any, ours: bool) -> tuple[Tensor, list[Tensor]]:
    """Logits, and all gradients of a training step."""
    model.zero_grad()
    if ours:
        model(TOKENS[:, :-1], TOKENS[:, 1:]).loss.backward()
        logits = model(TOKENS).logits_BSV
    else:
        out = model(input_ids=TOKENS, labels=TOKENS)
        out.loss.backward()
        logits = out.logits
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["ours", "ours, biased", *MODELS])
def test_replay_is_exact_to_the_last_bit(tmp_path: Path, name: str) -> None:
    ours = name.startswith("ours")
    model = our_model(0.01 if "biased" in name else 0.0) if ours else build(name)
    with record(model, tmp_path / "trace"):
        want, want_gradients = step(model, ours)
    with replay(model, Trace.open(tmp_path / "trace")):
        got, gradients = step(model, ours)
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(gradients, want_gradients, strict=True))
    again, _ = step(model, ours)
    assert torch.equal(again, want), "after the block the routers choose for themselves"


def test_replay_follows_the_trace_and_not_the_router(tmp_path: Path) -> None:
    """Another model's trace changes the logits, and its experts are the ones that get gradients."""
    model = our_model()
    ids = torch.tensor([[[3, 5]] * 18] * 2)
    with Recorder(tmp_path / "t", 16) as recorder:
        recorder.add(Pass(ids, torch.full(ids.shape, 0.5), torch.zeros(2, 18, 16), (2, 9), None))
    before = model(TOKENS).logits_BSV
    with replay(model, Trace.open(tmp_path / "t")):
        out = model(TOKENS)
    assert not torch.allclose(out.logits_BSV, before)
    assert all(set(r.ids_TK.flatten().tolist()) == {3, 5} for r in out.routing)
    out.logits_BSV.sum().backward()
    gradient = model.blocks[0].moe.experts.w_out_EDF.grad
    assert {e for e in range(16) if gradient[e].abs().sum() > 0} == {3, 5}


@pytest.mark.parametrize("n_experts", [16, 300])
def test_what_is_read_is_what_was_added(tmp_path: Path, n_experts: int) -> None:
    passes = []
    for seed, (B, S) in enumerate([(2, 5), (1, 30), (4, 4), (1, 1)]):
        g = torch.Generator().manual_seed(seed)
        ids = torch.rand(3, B * S, n_experts, generator=g).topk(2).indices
        passes.append(
            Pass(
                ids,
                torch.rand(ids.shape, generator=g),
                torch.zeros(1),
                (B, S),
                torch.randint(999, (B * S,), generator=g),
            )
        )
    with Recorder(tmp_path / "t", n_experts, shard_tokens=32) as recorder:
        for p in passes:
            recorder.add(p)
    trace = Trace.open(tmp_path / "t")
    assert (trace.n_layers, trace.n_experts, trace.top_k, trace.tokens) == (3, n_experts, 2, 57)
    assert len(trace.shards) == 2
    for got, p in zip(trace, passes, strict=True):
        assert torch.equal(got.ids_TLK, p.ids_LTK.transpose(0, 1))
        assert got.weights_TLK is not None
        assert torch.equal(got.weights_TLK, p.weights_LTK.transpose(0, 1))
        assert got.tokens_T is not None
        assert torch.equal(got.tokens_T, p.tokens_T)
        assert got.shape == p.shape


def test_compare(tmp_path: Path) -> None:
    """Two tokens in three are alike; the third has one other expert and its order turned round."""
    one = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    two = torch.tensor([[[0, 1], [2, 3], [6, 4]]])
    w_one, w_two = torch.tensor([[[0.5, 0.5]] * 3]), torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]])
    for name, ids, w, shapes in (("a", one, w_one, [(1, 3)]), ("b", two, w_two, [(1, 2), (1, 1)])):
        with Recorder(tmp_path / name, 16) as recorder:
            begin = 0
            for B, S in shapes:
                rows = slice(begin, begin + S)
                recorder.add(Pass(ids[:, rows], w[:, rows], torch.zeros(1), (B, S), None))
                begin += S
    found = compare(Trace.open(tmp_path / "a"), Trace.open(tmp_path / "b"))
    assert found.tokens == 3
    assert found.changed_L.tolist() == pytest.approx([1 / 3])
    assert found.first_changed_L.tolist() == pytest.approx([1 / 3])
    assert found.moved_L.tolist() == pytest.approx([1 / 6])
    gaps = [0, 0, abs(np.log(0.5 / 0.75)), abs(np.log(0.5 / 0.25)), 0]
    assert found.log_weight_L is not None
    assert found.log_weight_L.tolist() == pytest.approx([sum(gaps) / 5], rel=1e-6)
    same = compare(Trace.open(tmp_path / "a"), Trace.open(tmp_path / "a"))
    assert same.changed_L.tolist() == [0]


def write(path: Path, ids_TLK: Tensor, tokens: list[int] | None, weighed: bool = True) -> Trace:
    """A trace of one pass of one sequence."""
    weights = torch.full(ids_TLK.shape, 0.5) if weighed else None
    with Recorder(path, 16) as recorder:
        shape = torch.tensor([[1, len(ids_TLK)]], dtype=torch.int32)
        recorder.add_rows(ids_TLK, weights, None if tokens is None else torch.tensor(tokens), shape)
    return Trace.open(path)


def test_only_the_same_tokens_are_compared(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]])
    one = write(tmp_path / "one", ids, [7, 8, 9])
    for name, tokens in (("same", [7, 8, 9]), ("unknown", None)):
        other = write(tmp_path / name, ids, tokens)
        for found in (compare(one, other), compare(other, one)):
            assert (found.tokens, found.changed_L.tolist()) == (3, [0])
    with pytest.raises(TraceError, match="have different tokens, the first of them after 0"):
        compare(one, write(tmp_path / "different", ids, [7, 8, 10]))
    with pytest.raises(TraceError, match=r"tokens = 3 in .*, 2 in .*: traces of the same tokens"):
        compare(one, write(tmp_path / "shorter", ids[:2], [7, 8]))


def test_weights_are_compared_where_both_traces_have_them(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 1]], [[2, 3]]])
    one, other = write(tmp_path / "one", ids, None), write(tmp_path / "other", ids, None, weighed=False)
    for a, b in ((one, other), (other, one), (other, other)):
        assert compare(a, b).log_weight_L is None
    assert compare(one, one).log_weight_L is not None


def test_the_first_tokens_and_the_counts_of_a_trace(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    passes = [torch.rand(T, 3, 16, generator=g).topk(2).indices for T in (5, 0, 4, 7)]
    place = tmp_path / "a" / "new" / "directory"
    with Recorder(place, 16, shard_tokens=6) as recorder:
        for ids in passes:
            shape = (1, len(ids))
            recorder.add(Pass(ids.transpose(0, 1), torch.ones(3, len(ids), 2), torch.zeros(1), shape, None))
    trace = Trace.open(place)
    want = torch.cat(passes)
    for n in (0, 1, 5, 6, 9, 15, 16, 100):
        assert trace.ids_TLK(n).tolist() == want[:n].tolist()
    counts = [[[int((ids[:, layer] == e).sum()) for e in range(16)] for layer in range(3)] for ids in passes]
    assert trace.counts_PLE().tolist() == [c for c, ids in zip(counts, passes, strict=True) if len(ids)]


def test_what_bad_traces_and_calls_get(tmp_path: Path) -> None:
    model = our_model()
    with record(model, tmp_path / "t"):
        model(TOKENS)
    trace = Trace.open(tmp_path / "t")
    with replay(model, trace), pytest.raises(TraceError, match=r"pass 0 has 18 tokens, the model was called with 2"):
        model(TOKENS[:1, :2])
    with replay(model, trace):
        model(TOKENS)
        with pytest.raises(TraceError, match=r"no pass left to replay; it has 18 tokens"):
            model(TOKENS)
    with pytest.raises(TraceError, match=r"exists and is not an empty directory"), record(model, tmp_path / "t"):
        pass
    with pytest.raises(TraceError, match=r"no trace.json there"):
        Trace.open(tmp_path / "nothing")
    small = moe.Transformer(moe.load_config("replica-tiny").scaled(d_model=192, n_layers=1))
    with pytest.raises(TraceError, match=r"n_layers = 2, but the model has 1"), replay(small, trace):
        pass
    shard = tmp_path / "t" / trace.shards[0][0]
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(TraceError, match=r"trace-00000.safetensors: unreadable"):
        list(trace)
    (tmp_path / "t" / "trace.json").write_text(json.dumps({"format": "other", "version": 9}))
    with pytest.raises(TraceError, match=r"format 'other' version 9"):
        Trace.open(tmp_path / "t")


def test_a_killed_recording_is_readable_up_to_its_last_shard(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "t", 16, shard_tokens=10)
    ids = torch.zeros(1, 6, 1, dtype=torch.int64)
    for _ in range(3):  # two make a shard; the third is lost, as nothing closes the recorder
        recorder.add(Pass(ids, torch.ones(ids.shape), torch.zeros(1), (1, 6), None))
    assert Trace.open(tmp_path / "t").tokens == 12
    assert len(list(Trace.open(tmp_path / "t"))) == 2


def broken(path: Path, **changes: Any) -> Trace:
    """A trace of one pass of 2 x 3 tokens, 2 layers, of which parts are others (None: missing)."""
    ids = torch.tensor([[[0, 1], [2, 3]]] * 6)
    with Recorder(path, 16) as recorder:
        recorder.add_rows(ids, torch.full(ids.shape, 0.5), torch.arange(6), torch.tensor([[2, 3]], dtype=torch.int32))
    shard = path / "trace-00000.safetensors"
    parts = load_file(shard) | changes
    save_file({name: part.contiguous() for name, part in parts.items() if part is not None}, shard)
    return Trace.open(path)


def at(token: int, layer: int, row: list[float], like: Tensor) -> Tensor:
    like[token, layer] = torch.tensor(row, dtype=like.dtype)
    return like


IDS = torch.tensor([[[0, 1], [2, 3]]] * 6)
HALVES = torch.full(IDS.shape, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids_TLK": at(4, 1, [3, 3], IDS.clone())}, r"the experts \[3, 3\] of token 4 in layer 1 are an expert twice"),
        ({"ids_TLK": at(5, 0, [3, 16], IDS.clone())}, r"experts \[3, 16\] of token 5 in layer 0 are outside 0 to 15"),
        ({"ids_TLK": at(0, 0, [-1, 16], IDS.to(torch.int16))}, r"experts \[-1, 16\] of token 0 in layer 0 are outside"),
        ({"ids_TLK": IDS[:5]}, r"ids_TLK has the shape \[5, 2, 2\], but trace.json says \[6, 2, 2\]"),
        ({"ids_TLK": IDS[:, :1]}, r"ids_TLK has the shape \[6, 1, 2\]"),
        ({"ids_TLK": IDS.float()}, "ids_TLK has the dtype torch.float32"),
        ({"ids_TLK": None}, "has no ids_TLK"),
        ({"weights_TLK": at(2, 1, [0.5, float("nan")], HALVES.clone())}, "the weight nan of token 2 in layer 1 is no"),
        ({"weights_TLK": at(3, 0, [float("inf"), 0], HALVES.clone())}, "the weight inf of token 3 in layer 0 is no"),
        ({"weights_TLK": HALVES[..., 0]}, r"weights_TLK has the shape \[6, 2\]"),
        ({"weights_TLK": IDS}, "weights_TLK has the dtype torch.int64"),
        ({"tokens_T": torch.arange(5)}, r"tokens_T has the shape \[5\]"),
        ({"passes_P2": torch.tensor([[2, 4]])}, "its passes hold other than the 6 tokens"),
        ({"passes_P2": torch.tensor([[-2, -3]])}, "its passes hold other than the 6 tokens"),
        ({"passes_P2": None}, "has no passes_P2"),
    ],
)
def test_a_shard_with_what_cannot_be_is_refused_with_its_row(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    trace = broken(tmp_path / "t", **changes)
    for read in (list, Trace.counts_PLE, lambda t: t.ids_TLK(3), lambda t: compare(t, t)):
        with pytest.raises(TraceError, match=rf"trace-00000.safetensors: .*{message}.*record the rest again"):
            read(trace)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": ', '"text"', "\x00", '{"shards": 3}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(TraceError, match=r"trace.json: not a routing trace"):
        Trace.open(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("n_layers", -1), ("top_k", "2"), ("n_experts", 1.5), ("missing", None)])
def test_an_index_with_counts_that_are_none(tmp_path: Path, key: str, value: Any) -> None:
    broken(tmp_path / "t")
    index = tmp_path / "t" / "trace.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {key: value}))
    with pytest.raises(TraceError, match=r"trace.json: not a routing trace.*is no count"):
        Trace.open(tmp_path / "t")


def test_an_index_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    with pytest.raises(TraceError, match=r"trace.json: cannot be read \(Is a directory\)"):
        Trace.open(tmp_path)


def test_what_no_router_can_have_chosen_is_not_recorded(tmp_path: Path) -> None:
    for row, message in (([3, 3], "an expert twice"), ([0, 16], "outside 0 to 15"), ([300, 1], "outside 0 to 15")):
        with Recorder(tmp_path / str(row), 16) as recorder:
            ids = torch.tensor([[[0, 1], row]])
            with pytest.raises(TraceError, match=rf"of token 1 in layer 0 are {message}"):
                recorder.add(Pass(ids, torch.ones(ids.shape), torch.zeros(1), (1, 2), None))


def test_two_recordings_into_one_directory(tmp_path: Path) -> None:
    ids = torch.tensor([[[0, 1]]])
    with Recorder(tmp_path / "t", 16) as recorder:
        recorder.add(Pass(ids, torch.ones(ids.shape), torch.zeros(1), (1, 1), None))
        with pytest.raises(InUseError, match=r"is in use by process"):
            Recorder(tmp_path / "t", 16)
    assert Trace.open(tmp_path / "t").tokens == 1
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["trace-00000.safetensors", "trace.json"]
    with pytest.raises(TraceError, match="exists and is not an empty directory"):
        Recorder(tmp_path / "t", 16)
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == ["trace-00000.safetensors", "trace.json"]
