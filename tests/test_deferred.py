"""Models whose weights come later, or from elsewhere: tied weights stay tied, the router's bias stays precise.

The ways: off the meta device, torch's state dicts, casts, copies, pickles, sharding. After each the model can be saved
and loaded.
"""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import moe
from moe import lora
from moe.config import RouterConfig
from moe.errors import CheckpointError
from moe.experts import Router
from moe.generate import stream
from moe.layers import KVCache
from moe.model import Transformer
from moe.weights import init_weights
from tests.conftest import ROOT, tiny_config

TIED = tiny_config(tie_embeddings=True, router=RouterConfig(bias_update_rate=0.001))
TOKENS = torch.arange(18).view(2, 9)


def on_meta() -> Transformer:
    with torch.device("meta"):
        return Transformer(TIED)


def filled(model: Transformer) -> Transformer:
    """With a bias that is not zero."""
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.linspace(-0.01, 0.01, 5))
        assert name.endswith("bias_E")
    return model


def without(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


# ------------------------------------------------------------------------------------------------------ tied weights


def materialised(state: dict[str, Tensor]) -> Transformer:
    model = on_meta()
    model.to_empty(device="cpu")
    init_weights(model, 0)
    model.load_state_dict(state)
    return model


def assigned(state: dict[str, Tensor], leave_out: str = "") -> Transformer:
    model = on_meta()
    model.load_state_dict(without(leave_out, state), assign=True)
    return model


def copied_in(state: dict[str, Tensor], leave_out: str) -> Transformer:
    model = Transformer(TIED, seed=9)
    model.load_state_dict(without(leave_out, state))
    return model


def in_a_wrapper(state: dict[str, Tensor]) -> Transformer:
    with torch.device("meta"):
        outer = nn.ModuleDict({"inner": Transformer(TIED)})
    outer.load_state_dict({f"inner.{key}": tensor for key, tensor in state.items()}, assign=True)
    return outer["inner"]  # type: ignore[return-value]


def overwritten(state: dict[str, Tensor]) -> Transformer:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return materialised(state).double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


WAYS: dict[str, Callable[[dict[str, Tensor]], Transformer]] = {
    "to_empty": materialised,
    "assign": assigned,
    "assign, embedding only": lambda state: assigned(state, "head.weight"),
    "assign, head only": lambda state: assigned(state, "embedding.weight"),
    "embedding only": lambda state: copied_in(state, "head.weight"),
    "head only": lambda state: copied_in(state, "embedding.weight"),
    "assign in a wrapper": in_a_wrapper,
    "deepcopy": lambda state: copy.deepcopy(materialised(state)),
    "pickle": lambda state: pickle.loads(pickle.dumps(materialised(state))),
    "assign to a copy": lambda state: assigned(copy.deepcopy(state)),
    "conversions that make parameters": overwritten,
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_tied_stays_tied(way: str, tmp_path: Path) -> None:
    original = filled(Transformer(TIED, seed=3))
    model = WAYS[way](original.state_dict())
    assert model.head.weight is model.embedding.weight
    moe.save(model, tmp_path / "model")
    loaded = moe.load(tmp_path / "model")
    assert loaded.head.weight is loaded.embedding.weight
    want = original(TOKENS).logits_BSV
    for each in (model, loaded):
        assert torch.equal(each(TOKENS).logits_BSV, want)  # type: ignore[arg-type]
    loss = model(TOKENS, TOKENS).loss
    assert loss is not None
    loss.backward()
    with torch.no_grad():
        model.embedding.weight -= 1
    assert torch.equal(model.head.weight, model.embedding.weight)


def test_two_tied_weights_that_differ_are_refused() -> None:
    state = Transformer(TIED).state_dict()
    state["head.weight"] = state["head.weight"] + 1
    with pytest.raises(RuntimeError, match="are tied, but differ: load them into a model with tie_embeddings = false"):
        Transformer(TIED).load_state_dict(state)
    untied = Transformer(tiny_config(router=TIED.router))
    untied.load_state_dict(state)
    assert torch.equal(untied.head.weight, state["head.weight"])


def test_an_output_layer_of_another_kind_is_left_alone() -> None:
    """A quantised, adapted or replaced head is not made the embedding's by a cast, a move or a state dict."""
    peft = pytest.importorskip("peft")
    replaced = Transformer(TIED)
    replaced.head = nn.Linear(24, 61, bias=True)  # type: ignore[assignment]
    quantised = Transformer(TIED)
    quantised.head.weight = nn.Parameter(Int8(quantised.head.weight.detach()), requires_grad=False)
    adapted = Transformer(TIED)
    peft.get_peft_model(adapted, peft.LoraConfig(r=4, target_modules=["head"], init_lora_weights=False))
    for model in (replaced, quantised, adapted):
        before, head = model(TOKENS).logits_BSV, model.head
        model.to("cpu").tie_weights()
        assert model.head is head
        assert torch.equal(model(TOKENS).logits_BSV, before)  # type: ignore[arg-type]
    adapted.load_state_dict(adapted.state_dict())


def test_a_state_dict_that_is_given_stays_as_it_is() -> None:
    state = without("head.weight", Transformer(TIED).state_dict())
    state = {key: tensor.bfloat16() for key, tensor in state.items()}
    names = list(state)
    Transformer(TIED).load_state_dict(state)
    assert list(state) == names
    assert all(tensor.dtype == torch.bfloat16 for tensor in state.values())


def test_a_module_that_cannot_make_its_weights_says_so() -> None:
    """torch's deferred initialisation calls reset_parameters on every module that has it."""
    model = on_meta()
    model.to_empty(device="cpu")
    seen = set()
    for module in [*model.modules(), *with_adapters().modules()]:
        if any(True for _ in module.parameters(recurse=False)):
            with pytest.raises(RuntimeError, match=r"place in the model: call moe.weights.init_weights\(model, seed\)"):
                module.reset_parameters()  # type: ignore[operator]
            seen.add(type(module).__name__)
    assert seen >= {"Embedding", "Linear", "Head", "RMSNorm", "Router", "Experts", "LoraLinear", "LoraExperts"}


def with_adapters() -> Transformer:
    model = Transformer(tiny_config())
    lora.add(model, lora.LoraConfig())
    return model


def test_building_a_model_draws_nothing_from_torchs_generator() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    Transformer(TIED)
    assert torch.equal(torch.random.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------- the router's bias


def router(model: nn.Module) -> Router:
    return next(module for module in model.modules() if isinstance(module, Router))


def under_default_dtype(dtype: torch.dtype) -> Transformer:
    torch.set_default_dtype(dtype)
    try:
        return Transformer(TIED)
    finally:
        torch.set_default_dtype(torch.float32)


def from_narrow_state(assign: bool) -> Transformer:
    state = {key: tensor.bfloat16() for key, tensor in Transformer(TIED).state_dict().items()}
    model = on_meta() if assign else Transformer(TIED)
    model.load_state_dict(state, assign=assign)
    return model


def through_meta() -> Transformer:
    model = on_meta().to(torch.bfloat16).to_empty(device="cpu")
    init_weights(model, 0)
    return model


NARROW: dict[str, Callable[[], Transformer]] = {
    "to(bfloat16)": lambda: Transformer(TIED).to(torch.bfloat16),
    "to(device, dtype)": lambda: Transformer(TIED).to("cpu", torch.float16),
    "half": lambda: Transformer(TIED).half(),
    "bfloat16": lambda: Transformer(TIED).bfloat16(),
    "twice": lambda: Transformer(TIED).double().half(),
    "type": lambda: Transformer(TIED).type(torch.bfloat16),
    "default dtype": lambda: under_default_dtype(torch.bfloat16),
    "state dict": lambda: from_narrow_state(assign=False),
    "assigned state dict": lambda: from_narrow_state(assign=True),
    "meta": through_meta,
    "copy": lambda: copy.deepcopy(Transformer(TIED).half()),
    "pickle": lambda: pickle.loads(pickle.dumps(Transformer(TIED).half())),
}


@pytest.mark.parametrize("way", NARROW)
def test_the_bias_sums_a_thousand_small_steps(way: str, tmp_path: Path) -> None:
    """In bfloat16 0.001 stops to count at 0.5, and in float16 the sum is 1% off."""
    model = NARROW[way]()
    module = router(model)
    for _ in range(1000):
        module.update_bias(torch.tensor([0, 9, 9, 9, 9]))
    assert module.bias_E is not None
    assert module.weight.dtype in (torch.bfloat16, torch.float16) or "state dict" in way
    assert module.bias_E.dtype == torch.float32
    assert module.bias_E.tolist() == pytest.approx([1, -1, -1, -1, -1], rel=1e-4)
    moe.save(model, tmp_path / "model")
    for dtype in (None, torch.bfloat16):
        loaded = router(moe.load(tmp_path / "model", dtype=dtype)).bias_E
        assert loaded is not None
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, module.bias_E)


def test_a_cast_rounds_nothing_off_the_bias() -> None:
    model = filled(Transformer(TIED))
    want = router(model).bias_E.clone()  # type: ignore[union-attr]
    model.half()
    assert torch.equal(router(model).bias_E, want)  # type: ignore[arg-type]
    assert router(model.double()).bias_E.dtype == torch.float64  # type: ignore[union-attr]
    assert router(under_default_dtype(torch.float64)).bias_E.dtype == torch.float64  # type: ignore[union-attr]
    assert torch.equal(router(model.float()).bias_E, want)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- what save refuses


class Int8(Tensor):
    """A weight of int8 and a scale, as quantised weights are."""

    @staticmethod
    def __new__(cls, w: Tensor) -> "Int8":
        return Tensor._make_wrapper_subclass(cls, w.shape, dtype=w.dtype)  # type: ignore[attr-defined]

    def __init__(self, w: Tensor) -> None:
        self.scale = w.abs().amax(1, keepdim=True) / 127
        self.whole = (w / self.scale).round().to(torch.int8)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.whole * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


def quantised(*names: str) -> Transformer:
    model = Transformer(tiny_config())
    for name in names:
        module = model.get_submodule(name)
        module.weight = nn.Parameter(Int8(module.weight.detach()), requires_grad=False)  # type: ignore[arg-type]
    return model


QUANTISED = ("blocks.0.attention.wq", "blocks.1.attention.wo", "head")


def test_quantised_weights_count_on_every_way() -> None:
    """A weight of a tensor subclass is used as it is: in logits, the loss, generation."""
    model, same = quantised(*QUANTISED), Transformer(tiny_config())
    for name in QUANTISED:
        module = same.get_submodule(name)
        module.weight = nn.Parameter(model.get_submodule(name).weight.dequantize())  # type: ignore[operator]
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits_BSV, same(TOKENS).logits_BSV)  # type: ignore[arg-type]
        assert torch.allclose(model(TOKENS, TOKENS).loss, same(TOKENS, TOKENS).loss, rtol=1e-6)  # type: ignore[arg-type]
    ids = [torch.stack(list(stream(m, TOKENS, 6, temperature=0))) for m in (model, same)]
    assert torch.equal(*ids)


def changed(change: Callable[[Transformer], object], **cfg: object) -> Transformer:
    model = Transformer(tiny_config(**cfg))  # type: ignore[arg-type]
    change(model)
    return model


def untie(model: Transformer) -> None:
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())


def tie(model: Transformer) -> None:
    model.head.weight = model.embedding.weight


REFUSED: dict[str, tuple[Callable[[], Transformer], str]] = {
    "int8": (lambda: quantised("head"), "head.weight is a Int8, not a plain tensor .*before it was quantised"),
    "untied": (lambda: changed(untie, tie_embeddings=True), r"head.weight.*no longer one: call model.tie_weights\(\)"),
    "tied by hand": (lambda: changed(tie), "head.weight.*give the configuration tie_embeddings = true"),
    "adapters": (with_adapters, r"adapters: save moe.lora.merged\(model\), or .*save_adapter"),
    "a bias": (lambda: changed(lambda m: setattr(m, "head", nn.Linear(24, 61))), "head.bias.*take adapters, wrappers"),
    "another shape": (
        lambda: changed(lambda m: setattr(m, "head", nn.Linear(24, 7, bias=False))),
        r"head.weight is \[7",
    ),
    "a part": (lambda: changed(lambda m: setattr(m, "head", None)), "head.weight"),
    "meta": (on_meta, "is on the meta device, so there is nothing to save"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_could_not_be_loaded_is_not_saved(what: str, tmp_path: Path) -> None:
    make, message = REFUSED[what]
    with pytest.raises(CheckpointError, match=message):
        moe.save(make(), tmp_path / "some" / "model")
    assert list(tmp_path.iterdir()) == []


def test_nor_is_it_exported(tmp_path: Path) -> None:
    for model in (changed(untie, tie_embeddings=True), changed(tie)):
        with pytest.raises(CheckpointError, match=r"head\.weight"):
            moe.hf.save(model, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_adapters_do_not_undo_what_was_changed() -> None:
    """LoRA puts a module of its own in a projection's place: a patched or quantised one is refused, not undone."""
    with pytest.raises(ValueError, match=r"blocks.0.attention.wq is no plain Linear .*unchanged model"):
        lora.add(quantised("blocks.0.attention.wq"), lora.LoraConfig())
    model = Transformer(tiny_config())
    model.blocks[1].moe.experts.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"blocks.1.moe.experts is no plain Experts"):
        lora.add(model, lora.LoraConfig())
    assert not lora.is_added(model)
    assert all(p.requires_grad for p in model.parameters())


SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import moe
from moe.errors import CheckpointError
from moe.model import Transformer
from moe.weights import init_weights
from tests.test_deferred import TIED, TOKENS, on_meta

dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh("cpu", (1,))
model = on_meta()
for block in model.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
model.to_empty(device="cpu")
init_weights(model, 0)
assert model.head.weight is model.embedding.weight
plain = Transformer(TIED)
assert torch.equal(model(TOKENS).logits_BSV, plain(TOKENS).logits_BSV)
assert model.head.weight is model.embedding.weight
try:
    moe.save(model, sys.argv[1])
    raise SystemExit("a sharded model was saved")
except CheckpointError as error:
    assert "embedding.weight is sharded over ranks (DTensor): gather" in str(error), error
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
whole = Transformer(TIED, seed=1)
whole.load_state_dict(state)
moe.save(whole, sys.argv[1])
assert torch.equal(moe.load(sys.argv[1])(TOKENS).logits_BSV, plain(TOKENS).logits_BSV)
"""


def test_a_sharded_model_is_tied_too_and_saved_whole(tmp_path: Path) -> None:
    """The remedy of the message works, word for word."""
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "model")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_reprs_show_experts() -> None:
    text = repr(Transformer(TIED))
    assert "(router): Router(24, 5 experts, top_k=2, bias_E)" in text
    assert "(experts): Experts(5 x (d_model=24, d_ff=20), activation=swiglu, 7,200 parameters)" in text
    assert "(norm): RMSNorm(24, eps=1e-05)" in text
    cache = KVCache(TIED, 2, 12, torch.float32, "cpu")
    assert repr(cache) == (
        "KVCache(2 layers, lengths=[0, 0], max_len=12, n_kv_heads=1, head_dim=10, torch.float32, cpu)"
    )
