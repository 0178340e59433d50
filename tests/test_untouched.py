"""Every fused path stands in for a module only where it is exactly ours: each path under each way of patching a model.

The paths: the output layer's fused loss, and generation's fused step (with its shortcuts through the experts). What the
patched model really does is what its modules do when they are called: logits of whole sequences, without a cache.
"""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from moe.config import TrainConfig
from moe.generate import stream
from moe.layers import Head, untouched
from moe.model import Transformer
from moe.profile import timing
from moe.serve.runner import fits
from tests.conftest import ROOT, rel, tiny_config

PLACES = [
    "head",
    "norm",
    "blocks.1.attention.wv",
    "blocks.0.moe.router",
    "blocks.1.moe.experts",
    "blocks.0",
    "embedding",
]
V = 61


@pytest.fixture
def model() -> Transformer:
    """In float64, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = Transformer(tiny_config()).double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 1)
    return model


def turned(y: Any) -> Any:
    """A change of an output that a later norm does not undo."""
    if isinstance(y, Tensor):
        return y.roll(1, -1) * 1.5
    if hasattr(y, "_replace"):  # Routing
        return y._replace(weights_TK=y.weights_TK * torch.tensor([1.5, -0.5], dtype=y.weights_TK.dtype))
    return (turned(y[0]), *y[1:])


class Turned(nn.Module):
    """Parametrizes a weight."""

    def forward(self, w: Tensor) -> Tensor:
        return turned(w)


class TurnedWeight(Tensor):
    """A tensor whose every use goes through functions of its own, as quantised weights' do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in ("__get__", "detach", "requires_grad_", "as_subclass"):
            return super().__torch_function__(func, types, args, kwargs or {})
        plain = [turned(a.as_subclass(Tensor)) if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


@contextmanager
def instance_forward(model: nn.Module, module: Any) -> Iterator[None]:
    old = module.forward
    module.forward = lambda *args: turned(old(*args))
    yield


@contextmanager
def forward_hook(model: nn.Module, module: nn.Module) -> Iterator[None]:
    module.register_forward_hook(lambda _module, _args, y: turned(y))
    yield


@contextmanager
def pre_hook(model: nn.Module, module: nn.Module) -> Iterator[None]:
    def before(_module: nn.Module, args: Any) -> Any:
        x = args[0]
        return ((x + 1) % V if not x.is_floating_point() else turned(x), *args[1:])

    module.register_forward_pre_hook(before)
    yield


@contextmanager
def global_hook(model: nn.Module, module: nn.Module) -> Iterator[None]:
    def after(called: nn.Module, _args: Any, y: Any) -> Any:
        return turned(y) if called is module else y

    handle = torch.nn.modules.module.register_module_forward_hook(after)
    yield
    handle.remove()


@contextmanager
def parametrized(model: nn.Module, module: nn.Module) -> Iterator[None]:
    for name, _ in list(module.named_parameters(recurse=False)):
        parametrize.register_parametrization(module, name, Turned())
    yield


@contextmanager
def subclassed_weight(model: nn.Module, module: nn.Module) -> Iterator[None]:
    for name, w in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(w.detach().as_subclass(TurnedWeight), requires_grad=False))
    yield


@contextmanager
def another_class(model: nn.Module, module: nn.Module) -> Iterator[None]:
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, *args: turned(kind.forward(self, *args))})
    yield


@contextmanager
def class_forward(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """As kernel libraries do it: into the class, for all its modules."""
    kind, own = type(module), "forward" in type(module).__dict__
    old = kind.forward

    @functools.wraps(old)
    def forward(self: Any, *args: Any) -> Any:
        return turned(old(self, *args))

    kind.forward = forward
    yield
    if own:
        kind.forward = old
    else:
        del kind.forward


PATCHES = [
    class_forward,
    instance_forward,
    forward_hook,
    pre_hook,
    global_hook,
    parametrized,
    subclassed_weight,
    another_class,
]


def loss_of_logits(model: Transformer, tokens: Tensor, targets: Tensor) -> Tensor:
    logits = model(tokens).logits_BSV
    assert logits is not None
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def continued(model: Transformer, prompt: Tensor, n: int) -> Tensor:
    """Greedy, from the logits of whole sequences."""
    tokens = prompt
    for _ in range(n):
        logits = model(tokens).logits_BSV
        assert logits is not None
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[:, prompt.shape[1] :]


def check(model: Transformer, before: tuple[Tensor, Tensor]) -> None:
    """Loss and generation are those of the patched modules, which are not those of before."""
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = loss_of_logits(model, tokens[:, :-1], tokens[:, 1:])
        loss = model(tokens[:, :-1], tokens[:, 1:]).losses["lm"]
        ids = continued(model, tokens, 6)
    assert rel(loss, want) < 1e-12
    assert torch.equal(torch.stack(list(stream(model, tokens, 6, temperature=0)), 1), ids)
    assert torch.equal(model.generate(tokens, 6, temperature=0)[:, 9:], ids)
    assert rel(before[0], want) > 1e-3
    assert not torch.equal(before[1], ids)


WITHOUT_WEIGHTS = {"blocks.0"}
CASES = [
    pytest.param(patch, place, id=f"{patch.__name__}-{place}")
    for patch in PATCHES
    for place in PLACES
    if not (patch in (parametrized, subclassed_weight) and place in WITHOUT_WEIGHTS)
]


@pytest.mark.parametrize(("patch", "place"), CASES)
def test_a_patched_module_is_called(model: Transformer, patch: Callable[..., Any], place: str) -> None:
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = loss_of_logits(model, tokens[:, :-1], tokens[:, 1:]), continued(model, tokens, 6)
    assert fits(model)
    module = model.get_submodule(place)
    with patch(model, module):
        check(model, before)
        assert not fits(model)
        assert place != "head" or not untouched(model.head, Head, called=True)


def a_bias(place: str) -> Callable[[Transformer], None]:
    def patch(model: Transformer) -> None:
        linear: Any = model.get_submodule(place)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64) * 3)

    return patch


def another_epsilon(model: Transformer) -> None:
    for norm in (model.norm, model.blocks[0].mlp_norm):
        norm.eps = 5.0  # type: ignore[union-attr]


@pytest.mark.parametrize("patch", [a_bias("head"), a_bias("blocks.1.attention.wo"), another_epsilon])
def test_what_ours_are_given_counts(model: Transformer, patch: Callable[[Transformer], None]) -> None:
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = loss_of_logits(model, tokens[:, :-1], tokens[:, 1:]), continued(model, tokens, 6)
    patch(model)
    check(model, before)


def test_another_output_layer_learns() -> None:
    """A head with a bias: the bias counts and has a gradient."""
    model = Transformer(tiny_config())
    model.head = nn.Linear(24, V, bias=True)  # type: ignore[assignment]
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:]).losses["lm"]
    assert rel(loss, loss_of_logits(model, tokens[:, :-1], tokens[:, 1:])) < 1e-6
    loss.backward()
    assert model.head.bias.grad is not None
    assert model.head.bias.grad.norm() > 0


def test_adapters_of_peft_on_every_linear_learn() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(Transformer(tiny_config()), lora)
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    out = model(tokens[:, :-1], tokens[:, 1:])
    want = loss_of_logits(model, tokens[:, :-1], tokens[:, 1:])
    assert rel(out.losses["lm"], want) < 1e-6
    out.loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert any("head" in name for name in adapters)
    assert all(gradient is not None and gradient.norm() > 0 for gradient in adapters.values())


def on_the_whole(model: Transformer) -> None:
    """Changes the logits after the output layer, where only the model's own call shows it."""

    def after(_module: nn.Module, _args: Any, out: Any) -> Any:
        out.logits_BSV = None if out.logits_BSV is None else turned(out.logits_BSV)
        return out

    model.register_forward_hook(after)


def before_the_head(model: Transformer) -> None:
    model.head.register_forward_pre_hook(lambda _module, args: (turned(args[0]), *args[1:]))


@pytest.mark.parametrize("patch", [on_the_whole, before_the_head])
def test_lm_eval_scores_what_the_model_says(patch: Callable[[Transformer], None]) -> None:
    """It asks the output layer for some positions only: of a patched model, the logits after all."""
    pytest.importorskip("lm_eval")
    from moe.lm_eval import MoeLM
    from moe.tokenizer import train_bpe

    tokenizer = train_bpe(["the cat sat on the mat. " * 20], 262)
    model = Transformer(tiny_config(vocab_size=tokenizer.vocab_size, train=TrainConfig(dtype="fp32"))).double()
    lm = MoeLM(model=model, tokenizer=tokenizer)
    context, continuation = tokenizer.encode("the cat"), tokenizer.encode(" sat on")

    def scored() -> float:
        return lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)[0][0]

    @torch.no_grad()
    def by_hand() -> float:
        logits = model(torch.tensor([context + continuation])[:, :-1]).logits_BSV
        assert logits is not None
        logp = logits[0, len(context) - 1 :].log_softmax(-1)
        return float(logp.gather(1, torch.tensor(continuation).unsqueeze(1)).sum())

    plain = by_hand()
    assert scored() == pytest.approx(plain, rel=1e-9)
    patch(model)
    assert scored() == pytest.approx(by_hand(), rel=1e-9)
    assert abs(by_hand() - plain) > 1e-3


def test_a_clock_changes_no_way(model: Transformer) -> None:
    """The profiler's hooks take any call: the fused loss stays fused."""
    with timing(model):
        assert untouched(model.head, Head, called=True)
        assert not untouched(model.head, Head)
    assert untouched(model.head, Head)


def test_backward_hooks_wait_for_the_module(model: Transformer) -> None:
    seen: list[torch.Size] = []
    model.head.register_full_backward_hook(lambda _m, _gx, gy: seen.append(gy[0].shape))
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    assert loss is not None
    loss.backward()
    assert seen == [torch.Size([2, 8, V])]
    assert not fits(model)
    assert not untouched(model.head, Head, called=True)


FSDP = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from moe.kernels import ops
from moe.model import Transformer
from tests.conftest import tiny_config

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
plain, model = (Transformer(tiny_config()) for _ in range(2))
mesh = init_device_mesh("cpu", (1,))
for block in model.blocks:
    fully_shard(block, mesh=mesh)
if sys.argv[1] == "head":
    fully_shard(model.head, mesh=mesh)
fully_shard(model, mesh=mesh)
fused, calls = ops.linear_cross_entropy, []
ops.linear_cross_entropy = lambda *args: (calls.append(1), fused(*args))[1]
for m in (plain, model):
    out = m(tokens[:, :-1], tokens[:, 1:])
    out.loss.backward()
for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
    assert torch.equal(a.grad, b.grad.full_tensor()), name
assert len(calls) == 2
model.head.register_forward_hook(lambda m, args, y: 2 * y)
model(tokens[:, :-1], tokens[:, 1:])
assert len(calls) == 2
"""


@pytest.mark.parametrize("how", ["head", "root"])
def test_the_fused_loss_is_that_of_a_sharded_head_too(how: str) -> None:
    """FSDP gathers the weight when the module is called, and it is called: alone in its shards, or with the root's."""
    done = subprocess.run([sys.executable, "-c", FSDP, how], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generation_from_weights_that_accelerate_keeps_elsewhere(model: Transformer) -> None:
    accelerate = pytest.importorskip("accelerate")
    tokens = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(0))
    want = continued(model, tokens, 6)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.embedding.weight.is_meta
    assert torch.equal(torch.stack(list(stream(model, tokens, 6, temperature=0)), 1), want)
    assert torch.equal(model.generate(tokens, 6, temperature=0)[:, 9:], want)
