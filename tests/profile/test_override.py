"""Replay travels with the pass: whatever a backward computes again takes the pass's own experts, against no
checkpointing at all."""

import copy
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import checkpoint as checkpoints
from torch.utils.checkpoint import checkpoint

from moe.errors import TraceError
from moe.model import Transformer
from moe.profile import Recorder, Trace, record, replay, routing
from moe.profile.observe import Pass
from tests.conftest import rel, tiny_config
from tests.hf_models import build

V, E = 61, 5
ROWS = [(2, 9), (1, 14), (2, 9), (2, 9)]  # the passes of the trace; the last two are of one size


def tokens(number: int) -> Tensor:
    return torch.randint(3, V, ROWS[number], generator=torch.Generator().manual_seed(number))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Experts at random, which no router would choose."""
    path = tmp_path_factory.mktemp("routes") / "trace"
    g = torch.Generator().manual_seed(9)
    with Recorder(path, E) as recorder:
        for B, S in ROWS:
            ids = torch.rand(2, B * S, E, generator=g).topk(2).indices
            recorder.add(Pass(ids, torch.full(ids.shape, 0.5), torch.zeros(1), (B, S), None))
    return Trace.open(path)


class Ours:
    """Our model, checkpointed as it offers."""

    modes = ("selective", "full")

    def __init__(self) -> None:
        self.model: Any = Transformer(tiny_config(), seed=1)

    def checkpoint(self, mode: str | None) -> None:
        self.model.activation_checkpointing = mode or "none"

    def loss(self, x: Tensor) -> Tensor:
        return self.model(x, x.roll(-1, 1)).loss


class Theirs:
    """Mixtral of transformers."""

    modes = ("reentrant", "not reentrant")

    def __init__(self) -> None:
        self.model = build("Mixtral", num_local_experts=E)

    def checkpoint(self, mode: str | None) -> None:
        if mode is None:
            self.model.gradient_checkpointing_disable()
        else:
            self.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})

    def loss(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x, labels=x).loss


CASES = [(kind, mode) for kind in (Ours, Theirs) for mode in kind.modes]
Subject = Ours | Theirs


def together(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        (s.loss(tokens(0)) + s.loss(tokens(1))).backward()


def in_turns(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        one, other = s.loss(tokens(0)), s.loss(tokens(1))
        other.backward()
        one.backward()


def first_first(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        one, other, third = (s.loss(tokens(i)) for i in range(3))
        one.backward()
        third.backward()
        other.backward()


def the_same_tokens_twice(s: Subject, trace: Trace) -> None:
    """Nothing but the pass tells which routes are meant."""
    with replay(s.model, trace):
        for i in range(2):
            s.loss(tokens(i))
        (s.loss(tokens(2)) - 3 * s.loss(tokens(2))).backward()


def after_the_block(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        losses = [s.loss(tokens(i)) for i in range(3)]
    s.loss(tokens(3)).detach()
    torch.stack(losses).sum().backward()


def after_the_block_within_another(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        one = s.loss(tokens(0))
    with replay(s.model, trace):
        other = s.loss(tokens(0)) * 2
        one.backward()
    other.backward()


def with_a_pass_between(s: Subject, trace: Trace) -> None:
    with replay(s.model, trace):
        one = s.loss(tokens(0))
        with torch.no_grad():
            s.loss(tokens(1))
        third = s.loss(tokens(2))
        with torch.inference_mode():
            s.loss(tokens(3))
        (one * third).backward()


def on_another_thread(s: Subject, trace: Trace) -> None:
    """As autograd's on CUDA."""
    with replay(s.model, trace):
        losses = [s.loss(tokens(i)) for i in range(2)]
        thread = threading.Thread(target=torch.stack(losses).sum().backward)
        thread.start()
        thread.join()


def after_an_error(s: Subject, trace: Trace) -> None:
    """A pass that was interrupted has taken its routes with it, as a recording of it would have none."""
    with replay(s.model, trace):
        one = s.loss(tokens(0))
        with pytest.raises(ValueError, match="stop"), stopped(s.model):
            s.loss(tokens(1))
        other = s.loss(tokens(2))
        (one + other).backward()


def hooks(model: Any) -> list[Any]:
    """transformers puts some of its own where it checkpoints."""
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


@contextmanager
def stopped(model: Any) -> Iterator[None]:
    blocks = model.blocks if isinstance(model, Transformer) else model.model.layers

    def stop(*_: Any) -> None:
        raise ValueError("stop")

    handle = blocks[1].register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "step",
    [
        together,
        in_turns,
        first_first,
        the_same_tokens_twice,
        after_the_block,
        after_the_block_within_another,
        with_a_pass_between,
        on_another_thread,
        after_an_error,
    ],
    ids=lambda step: step.__name__,
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize(("kind", "mode"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_the_same_gradients_as_without_checkpointing(
    kind: Callable[[], Subject], mode: str, step: Callable[..., None], trace: Trace
) -> None:
    found = []
    for setting in (None, mode):
        s = kind()
        s.checkpoint(setting)
        before = hooks(s.model)
        step(s, trace)
        found.append([p.grad for p in s.model.parameters()])
        assert hooks(s.model) == before
    assert all(rel(a, b) < 1e-5 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("mode", ["none", "full"])  # torch allows "selective" one backward only
def test_a_graph_that_is_kept(mode: str, trace: Trace) -> None:
    s = Ours()
    s.checkpoint(mode)
    with replay(s.model, trace):
        one, other = s.loss(tokens(0)), s.loss(tokens(1))
        (one + other).backward(retain_graph=True)
        want = [p.grad.clone() for p in s.model.parameters()]
    (one + other).backward()
    assert all(rel(p.grad, 2 * w) < 1e-6 for p, w in zip(s.model.parameters(), want, strict=True))


def whole(model: Any, x: Tensor, reentrant: bool) -> Tensor:
    kept = torch.zeros((), requires_grad=True)  # reentrant checkpointing wants an input with a gradient
    return checkpoint(lambda _, y: model(y, y.roll(-1, 1)).loss, kept, x, use_reentrant=reentrant)


def twice(model: Any, reentrant: bool) -> Tensor:
    """Two passes inside one checkpoint, each block of them checkpointed once more."""
    kept = torch.zeros((), requires_grad=True)

    def both(_: Tensor) -> Tensor:
        return whole(model, tokens(0), reentrant) - 2 * model(tokens(1), tokens(1).roll(-1, 1)).loss

    return checkpoint(both, kept, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inner", ["none", "full"])
@pytest.mark.parametrize("left", [False, True])
def test_checkpoints_around_the_whole_model_and_within_each_other(
    reentrant: bool, inner: str, left: bool, trace: Trace
) -> None:
    s, found = Ours(), []
    s.model.head.weight.data.mul_(3)
    with replay(s.model, trace):
        (s.loss(tokens(0)) - 2 * s.loss(tokens(1)) + s.loss(tokens(2))).backward()
    want = [p.grad.clone() for p in s.model.parameters()]
    s.model.zero_grad()
    s.checkpoint(inner)
    with replay(s.model, trace):
        loss = twice(s.model, reentrant) + whole(s.model, tokens(2), reentrant)
        found.append(loss)
        if not left:
            loss.backward()
    if left:
        loss.backward()
    assert all(rel(p.grad, w) < 1e-5 for p, w in zip(s.model.parameters(), want, strict=True))


def test_two_models_at_once(trace: Trace) -> None:
    """One calls the other between its own passes; each has its own place in the trace."""
    found = []
    for mode in ("none", "full"):
        one, other = Ours(), Ours()
        for s in (one, other):
            s.checkpoint(mode)
        with replay(one.model, trace), replay(other.model, trace):
            a = one.loss(tokens(0))
            b = other.loss(tokens(0))
            c = one.loss(tokens(1))
        (a * b * c).backward()
        found.append([p.grad for s in (one, other) for p in s.model.parameters()])
    assert all(rel(x, y) < 1e-5 for x, y in zip(*found, strict=True))


def test_passes_on_several_threads_each_take_one(tmp_path: Path) -> None:
    """And are seen: none is lost, none is mixed with another."""
    s, errors = Ours(), []
    ids = [torch.stack([torch.tensor([[i % E, (i + 1) % E]] * 8)] * 2) for i in range(40)]
    with Recorder(tmp_path / "t", E) as recorder:
        for one in ids:
            recorder.add(Pass(one, torch.full(one.shape, 0.5), torch.zeros(1), (1, 8), None))

    def work() -> None:
        try:
            for _ in range(10):
                s.loss(torch.zeros(1, 8, dtype=torch.int64))
        except Exception as error:
            errors.append(error)

    with record(s.model, tmp_path / "again"), replay(s.model, Trace.open(tmp_path / "t")), routing(s.model) as p:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert (p.passes, p.tokens) == (40, 320)
    seen = sorted(q.ids_TLK.transpose(0, 1).tolist() for q in Trace.open(tmp_path / "again"))
    assert seen == sorted(one.tolist() for one in ids), "every pass of the trace once, and whole"


def test_whoever_watches_sees_what_the_experts_get(trace: Trace, tmp_path: Path) -> None:
    """Whichever of the two blocks is the outer one."""
    s = Ours()
    with replay(s.model, trace), record(s.model, tmp_path / "inner"):
        s.loss(tokens(0))
    with record(s.model, tmp_path / "outer"), replay(s.model, trace):
        s.loss(tokens(0))
    want = next(iter(trace)).ids_TLK
    for name in ("inner", "outer"):
        assert torch.equal(next(iter(Trace.open(tmp_path / name))).ids_TLK, want)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")
@pytest.mark.parametrize("kind", [Ours, Theirs])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(kind: Callable[[], Subject], side: str, tmp_path: Path) -> None:
    """A trace holds the experts of text: padding keeps what its router chooses, and changes nothing of the text."""
    s, x = kind(), tokens(0)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[1, : 4 if side == "left" else 0] = mask[1, 9 if side == "left" else 5 :] = False
    named = {"mask_BS": mask} if isinstance(s, Ours) else {"attention_mask": mask.long()}
    g = torch.Generator().manual_seed(3)
    n = int(mask.sum())
    ids = torch.rand(2, n, E, generator=g).topk(2).indices
    with Recorder(tmp_path / "t", E) as recorder:
        recorder.add(Pass(ids, torch.full(ids.shape, 0.5), torch.zeros(1), (1, n), None))
    with replay(s.model, Trace.open(tmp_path / "t")), record(s.model, tmp_path / "again"):
        s.model(x, **named)
    assert torch.equal(next(iter(Trace.open(tmp_path / "again"))).ids_TLK, ids.transpose(0, 1))
    found = []
    for _ in range(2):
        with replay(s.model, Trace.open(tmp_path / "t")):
            out = s.model(x, **named)
        logits = out.logits_BSV if isinstance(s, Ours) else out.logits
        s.model.zero_grad()
        logits[mask].square().sum().backward()
        found.append([logits[mask], *(p.grad.clone() for p in s.model.parameters())])
        s.checkpoint(s.modes[-1])
    assert all(rel(a, b) < 1e-5 for a, b in zip(*found, strict=True))
    with (
        replay(s.model, Trace.open(tmp_path / "t")),
        pytest.raises(TraceError, match=f"has {n} tokens.* called with 18$"),
    ):
        s.model(x)


# ------------------------------------------------------------------------------------------ what cannot be replayed


def test_a_router_that_runs_outside_of_a_pass_is_refused(trace: Trace) -> None:
    one, other = Ours(), Theirs()
    for s, inner in (
        (one, lambda: one.model.blocks[0].moe(torch.zeros(1, 4, 24))),
        (other, lambda: other.model.model(input_ids=tokens(0))),
    ):
        with replay(s.model, trace):
            with pytest.raises(TraceError, match=r"router 0 runs outside of a call of .*: call the model that replay"):
                inner()
            s.loss(tokens(0))
        inner()


def test_a_pass_that_goes_around_a_router_is_refused(trace: Trace) -> None:
    s = Ours()
    router = s.model.blocks[1].moe.router
    plain = router.forward
    s.model.blocks[1].moe.forward = lambda x: (x, plain(x))  # as a captured graph: the module itself is not called
    with replay(s.model, trace), pytest.raises(TraceError, match=r"ran without its router 1 of 2"):
        s.loss(tokens(0))


def test_another_kind_of_checkpointing_is_refused(trace: Trace) -> None:
    """One that torch's does not know of cannot say which pass it repeats."""

    class Repeat(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Any, x: Tensor) -> Tensor:
            ctx.run = run
            ctx.save_for_backward(x)
            with torch.no_grad():
                return run(x)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                ctx.run(x).backward(grad)
            return None, x.grad

    s = Ours()
    block = s.model.blocks[0]
    plain = block.moe.forward
    block.moe.forward = lambda x: (Repeat.apply(lambda y: plain(y)[0], x), plain(x)[1])
    with replay(s.model, trace):
        loss = s.loss(tokens(0))
        with pytest.raises(
            TraceError, match=r"router 0 runs again inside a backward.*checkpoint with torch\.utils\.checkpoint"
        ):
            loss.backward()


# ----------------------------------------------------------------------------------------------------- copies, pickles


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_copies_made_inside_a_block_are_free_of_it(copied: str, trace: Trace) -> None:
    s = Ours()
    want = s.model(tokens(0)).logits_BSV
    with replay(s.model, trace), routing(s.model) as p:
        s.model(tokens(0))
        if copied == "deepcopy":
            other = copy.deepcopy(s.model)
        elif copied == "pickle":
            other = pickle.loads(pickle.dumps(s.model))
        else:
            file = io.BytesIO()
            torch.save(s.model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert torch.equal(other(tokens(0)).logits_BSV, want)
    assert torch.equal(other(tokens(0)).logits_BSV, want)
    assert p.passes == 1
    assert not hooks(other)
    again = copy.deepcopy(s.model)
    assert torch.equal(again(tokens(0)).logits_BSV, want)


def test_nothing_is_left_after_an_error(trace: Trace) -> None:
    s = Ours()
    before = checkpoints._checkpoint_without_reentrant_generator

    def run() -> None:
        with replay(s.model, trace), routing(s.model):
            s.loss(tokens(0))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert not hooks(s.model)
    assert "apply" not in vars(checkpoints.CheckpointFunction)
    assert checkpoints._checkpoint_without_reentrant_generator is before
    assert torch._dynamo.eval_frame._stance.stance == "default"
