"""What hooks cannot see, and what they saw although it was hard: compiled, wrapped, scripted, exported models."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.errors import NotObservable
from moe.model import Transformer
from moe.profile import Trace, record, replay, routing, timing
from tests.conftest import rel, tiny_config
from tests.hf_models import build

V, LAYERS = 97, 1
TOKENS = torch.randint(3, V, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def ours() -> Any:
    return Transformer(tiny_config(n_layers=LAYERS, vocab_size=V), seed=1)


def theirs() -> Any:
    return build("Mixtral", num_hidden_layers=LAYERS).eval()


def whole(model: Any) -> Any:
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model: Any) -> Callable[..., Any]:
    model.compile(backend="eager")
    return model


def by_block(model: Any) -> Callable[..., Any]:
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def by_mlp(model: Any) -> Callable[..., Any]:
    for layer in model.model.layers:
        layer.mlp.compile(backend="eager")
    return model


def as_function(model: Any) -> Callable[..., Any]:
    return torch.compile(lambda x: model(x), backend="eager")


def logits(output: Any) -> Tensor:
    return output.logits_BSV if hasattr(output, "logits_BSV") else output.logits


@pytest.mark.parametrize(
    ("model", "compiled"),
    [
        (ours, whole),
        (ours, by_block),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(ours, in_place), (ours, as_function)]),
        pytest.param(theirs, by_mlp, marks=pytest.mark.slow),
    ],
)
def test_models_compiled_and_run_before(model: Callable[[], Any], compiled: Any, tmp_path: Path) -> None:
    """The first call compiles without the hooks: what follows is seen, recorded and replayed all the same."""
    plain = model()
    with record(plain, tmp_path / "want"), torch.no_grad():
        plain(TOKENS)
    subject = model()
    run = compiled(subject)
    with torch.no_grad():
        run(TOKENS)
        with routing(subject, V) as p, record(subject, tmp_path / "got"):
            run(TOKENS)
    assert (p.passes, p.tokens) == (1, 18)
    assert int(p.token_counts_LEV.sum()) == 18 * LAYERS * 2
    want, got = (next(iter(Trace.open(tmp_path / name))) for name in ("want", "got"))
    assert torch.equal(want.ids_TLK, got.ids_TLK)
    # Another model's routes.
    other = model()
    with torch.no_grad():
        for p_ in other.parameters():
            p_.add_(torch.randn(p_.shape, generator=torch.Generator().manual_seed(3)), alpha=0.3)
    with record(other, tmp_path / "other"), torch.no_grad():
        other(TOKENS)
    with replay(subject, Trace.open(tmp_path / "other")), torch.no_grad():
        steered = logits(run(TOKENS))
    with replay(plain, Trace.open(tmp_path / "other")), torch.no_grad():
        assert rel(steered, logits(plain(TOKENS))) < 1e-6
    with torch.no_grad():
        assert rel(logits(run(TOKENS)), logits(plain(TOKENS))) < 1e-6
    assert rel(steered, logits(plain(TOKENS))) > 1e-3


def test_compiled_blocks_computed_again_when_the_block_has_been_left(tmp_path: Path) -> None:
    """The compiled block has no place for the routes: it runs eagerly in its backward, too."""
    found = []
    for compiled in (False, True):
        model = ours()
        if compiled:
            by_block(model)
            model(TOKENS)
        model.activation_checkpointing = "full" if compiled else "none"
        if not compiled:
            with record(model, tmp_path / "t"), torch.no_grad():
                model(TOKENS)
                model(TOKENS.flip(1))
        with replay(model, Trace.open(tmp_path / "t")):  # the other way round: not what the routers choose
            loss = model(TOKENS.flip(1), TOKENS).loss + model(TOKENS, TOKENS).loss
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(rel(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_the_compiled_module_itself_may_be_given() -> None:
    model = ours()
    run = whole(model)
    with torch.no_grad():
        run(TOKENS)
    for given, called in ((run, run), (run, model), (model, run)):
        with routing(given, V) as p:
            called(TOKENS)
        assert (p.passes, int(p.token_counts_LEV.sum())) == (1, 18 * LAYERS * 2)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_parallel_wrappers() -> None:
    """Where there is no GPU, DataParallel calls the module itself; its copies share the hooks of the original."""
    model = ours()
    wrapped = torch.nn.DataParallel(model)
    for given in (model, wrapped):
        with routing(given, V) as p:
            wrapped(TOKENS)
            model._replicate_for_data_parallel()  # a copy that runs nothing is no call
        assert (p.passes, int(p.token_counts_LEV.sum())) == (1, 18 * LAYERS * 2)


# ----------------------------------------------------------------------------------------------- what goes unseen


def test_a_block_in_which_nothing_was_seen_says_so(tmp_path: Path) -> None:
    model, other = ours(), ours()
    seen = "0 calls in the block, of which 0 passes through all of its 1 routers"
    with pytest.warns(UserWarning, match=seen), routing(model) as p:
        other(TOKENS)
    with pytest.raises(ValueError, match="nothing was profiled yet"):
        _ = p.counts_LE
    with pytest.warns(UserWarning, match="0 calls in the block"), record(model, tmp_path / "t"):
        other(TOKENS)
    assert Trace.open(tmp_path / "t").tokens == 0
    with record(model, tmp_path / "one"):
        model(TOKENS)
    trace = Trace.open(tmp_path / "one")
    with pytest.warns(UserWarning, match="no pass of Transformer was replayed"), replay(model, trace):
        other(TOKENS)


def test_calls_that_go_around_a_router_are_counted() -> None:
    """As a captured CUDA graph, or a layer that is dropped."""
    model = ours()
    moe = model.blocks[0].moe
    plain, around = moe.forward, lambda x: (x, moe.router.forward(x))

    def run() -> Any:
        with routing(model) as p:
            for moe.forward in (plain, around):
                model(TOKENS)
        return p

    with pytest.warns(UserWarning, match="2 calls in the block, of which 1 passes"):
        assert run().passes == 1


def test_an_error_in_the_block_is_not_covered_by_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="stop"), routing(ours()):
            raise RuntimeError("stop")
        model = ours()
        with routing(model) as p:
            with pytest.raises(ValueError, match="outside the vocabulary"):
                model(TOKENS + 1000)
            model(TOKENS)
    assert p.passes == 1


def test_what_has_no_routers_left_is_refused() -> None:
    """Traced and exported modules."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ours()

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits_BSV

    plain = Plain()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(plain, TOKENS, check_trace=False)
        exported = torch.export.export(plain, (TOKENS,)).module()
    either: list[Any] = [traced, exported]
    for model in either:
        with pytest.raises(NotObservable, match="has no router that is known here"), routing(model):
            pass


def test_copies_of_a_timed_model_have_no_clock() -> None:
    model = ours()
    with timing(model) as t:
        model(TOKENS)
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        calls = t.calls["norm", "forward"]
        for other in others:
            other(TOKENS, TOKENS).loss.backward()
        assert t.calls["norm", "forward"] == calls > 0
    for other in others:
        other(TOKENS, TOKENS).loss.backward()
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        left = [hook for m in other.modules() for kind in kinds for hook in getattr(m, kind).values()]
        assert not left


def test_tokens_of_int32(tmp_path: Path) -> None:
    for model in (ours(), theirs()):
        found = []
        for x in (TOKENS, TOKENS.int()):
            path = tmp_path / f"{type(model).__name__} {x.dtype}"
            with routing(model, V) as p, record(model, path), torch.no_grad():
                model(x)
            found.append((p.counts_LE.tolist(), p.token_counts_LEV.tolist(), next(iter(Trace.open(path))).tokens_T))
        (counts, of_tokens, tokens_T), other = found
        assert tokens_T is not None
        assert (counts, of_tokens, tokens_T.tolist()) == (*other[:2], TOKENS.flatten().tolist())


def test_a_pass_under_vmap_says_why_it_is_not_seen() -> None:
    model = Transformer(tiny_config())
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(NotObservable, match="call the model on the whole batch"), routing(model):
        torch.func.vmap(lambda x: model(x[None]).logits_BSV)(tokens)
