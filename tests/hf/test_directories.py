"""Directories with other files than one model's: what transformers reads is read, or an error says why not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
from moe import hf
from moe.config import RopeConfig
from moe.errors import CheckpointError, HFError
from tests.hf.test_mixtral import LINEAR_ROPE, SMALL, TOLERANCE, YARN_ROPE, from_pretrained, logit_error, mixtral

INDEX = "model.safetensors.index.json"
SHARDED, WHOLE = "100KB", "5GB"


@pytest.fixture(scope="module")
def models() -> list[Any]:
    return [mixtral(seed=seed, num_local_experts=4) for seed in (0, 1)]


def assert_as_transformers(directory: Path) -> None:
    assert logit_error(hf.load(directory), from_pretrained(directory), 16) < TOLERANCE


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("sizes", [(SHARDED, SHARDED), (WHOLE, WHOLE), (WHOLE,), (SHARDED,)])
def test_a_directory_saved_to_twice_is_the_second_model(models, sizes, tmp_path: Path) -> None:
    for model, size in zip(models, sizes, strict=False):
        model.save_pretrained(tmp_path, max_shard_size=size)
    assert_as_transformers(tmp_path)
    assert logit_error(hf.load(tmp_path), models[len(sizes) - 1], 16) < TOLERANCE


def test_an_index_whose_files_are_gone_is_passed_over_with_a_warning(models, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path, max_shard_size=SHARDED)
    models[1].save_pretrained(tmp_path, max_shard_size=WHOLE)
    assert (tmp_path / INDEX).is_file()
    with pytest.warns(UserWarning, match=r"names files that are all gone; model\.safetensors is read instead"):
        assert logit_error(hf.load(tmp_path), models[1], 16) < TOLERANCE
    assert logit_error(hf.load(tmp_path), from_pretrained(tmp_path), 16) < TOLERANCE


def test_two_sets_of_weights_are_refused(models, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path, max_shard_size=WHOLE)
    models[1].save_pretrained(tmp_path, max_shard_size=SHARDED)
    with pytest.raises(CheckpointError, match=r"two sets of weights, model\.safetensors .*00001-of-.*delete the older"):
        hf.load(tmp_path)
    (tmp_path / INDEX).unlink()  # what is left is what transformers read all the time
    assert_as_transformers(tmp_path)
    assert logit_error(hf.load(tmp_path), models[0], 16) < TOLERANCE


def test_an_index_of_the_one_file_is_no_contradiction(models, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert_as_transformers(tmp_path)


def test_files_that_are_not_read_change_nothing(models, tmp_path: Path) -> None:
    models[1].save_pretrained(tmp_path, max_shard_size=SHARDED)
    other = models[0].state_dict()
    torch.save(other, tmp_path / "pytorch_model.bin")
    save_file(other, tmp_path / "model-00001-of-00002.safetensors")  # a shard of an older model, in no index
    save_file(other, tmp_path / "consolidated.safetensors")
    (tmp_path / "model.safetensors.index.fp16.json").write_text((tmp_path / INDEX).read_text())
    assert_as_transformers(tmp_path)
    assert logit_error(hf.load(tmp_path), models[1], 16) < TOLERANCE


def test_weights_that_are_not_there_are_named(models, tmp_path: Path) -> None:
    models[0].save_pretrained(tmp_path, max_shard_size=SHARDED)
    (tmp_path / INDEX).rename(tmp_path / "index")
    with pytest.raises(CheckpointError, match=r"which has to say what model-00001-of-.* hold"):
        hf.load(tmp_path)
    (tmp_path / "index").rename(tmp_path / INDEX)
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(CheckpointError, match="and another file both hold"):
        hf.load(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=f"{second.name} is missing"):
        hf.load(tmp_path)
    for file in (*tmp_path.glob("model-*"), tmp_path / INDEX):
        file.unlink()
    torch.save(models[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights: .*save_pretrained"):
        hf.load(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(models, tmp_path: Path) -> None:
    """transformers would put it on."""
    peft = pytest.importorskip("peft")
    models[0].save_pretrained(tmp_path)
    tuned = peft.get_peft_model(
        mixtral(seed=0, num_local_experts=4), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path)
    assert logit_error(hf.load(models[0]), from_pretrained(tmp_path), 16) > 1e-3
    with pytest.raises(HFError, match=r"holds an adapter \(adapter_config\.json\).*merge_and_unload"):
        hf.load(tmp_path)
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_as_transformers(tmp_path / "merged")


def test_both_configurations_in_one_directory_are_no_guess(tmp_path: Path) -> None:
    ours = moe.Transformer(SMALL)
    hf.save(ours, tmp_path / "hf")
    moe.save(ours, tmp_path / "ours")
    (tmp_path / "hf" / "config.toml").write_text(SMALL.to_toml())
    (tmp_path / "ours" / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"Hugging Face's names: use moe\.hf\.load"):
        moe.load(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"this program's names: use moe\.load"):
        hf.load(tmp_path / "ours")
    for save, place in ((moe.save, "hf"), (hf.save, "ours"), (moe.save, "ours"), (hf.save, "hf")):
        before = sorted(os.listdir(tmp_path / place))
        with pytest.raises(CheckpointError, match="holds more than a checkpoint"):
            save(ours, tmp_path / place)
        assert sorted(os.listdir(tmp_path / place)) == before


# -------------------------------------------------------------------------------------------------------------- tied


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("size", [SHARDED, WHOLE])
def test_tied_weights_may_have_either_name(kept: str, size: str, tmp_path: Path) -> None:
    theirs = mixtral(tie_word_embeddings=True, num_local_experts=4)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors[kept] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, file, {"format": "pt"})
    if size == SHARDED:
        index = (tmp_path / INDEX).read_text()
        (tmp_path / INDEX).write_text(index.replace('"model.embed_tokens.weight"', f'"{kept}"'))
    ours = hf.load(tmp_path)
    assert ours.head.weight is ours.embedding.weight
    assert logit_error(ours, theirs, 16) < TOLERANCE
    assert_as_transformers(tmp_path)


def test_tied_weights_that_differ_or_are_absent_are_refused(tmp_path: Path) -> None:
    theirs = mixtral(tie_word_embeddings=True, num_local_experts=4)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for head in (torch.ones(96, 64), torch.ones(4, 64)):
        save_file(tensors | {"lm_head.weight": head}, file)
        with pytest.raises(
            HFError, match=r"weights are tied, but lm_head\.weight differs .*tie_word_embeddings to fal"
        ):
            hf.load(tmp_path)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(model\.embed_tokens\.weight\)"):
        hf.load(tmp_path)


def test_an_untied_model_needs_both(tmp_path: Path) -> None:
    theirs = mixtral(num_local_experts=4)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file)
    with pytest.raises(CheckpointError, match=r"missing \(lm_head\.weight\)"):
        hf.load(tmp_path)


# ----------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("stored", "named"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.float16, "bfloat16")]
)
def test_the_dtype_is_that_of_the_file(stored: torch.dtype, named: str, tmp_path: Path) -> None:
    mixtral(num_local_experts=4).to(stored).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": named, "torch_dtype": named}))
    assert {p.dtype for p in hf.load(tmp_path).parameters()} == {stored}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": LINEAR_ROPE, "rope_scaling": LINEAR_ROPE},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {k: v for k, v in YARN_ROPE.items() if k != "original_max_position_embeddings"}},
        {"rope_scaling": YARN_ROPE, "original_max_position_embeddings": 128},
        {"num_local_experts": None, "num_experts": 4},
        {"head_dim": None},
    ],
    ids=str,
)
def test_either_style_of_configuration_means_what_transformers_reads(settings: dict[str, Any], tmp_path: Path) -> None:
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 24}
    shape |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "max_position_embeddings": 512,
    }
    content = {"model_type": "mixtral", **shape, "initializer_range": 0.2, **settings}
    content = {k: v for k, v in content.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = transformers_config(tmp_path)
    torch.manual_seed(0)
    theirs = type(mixtral())(config).eval()
    (tmp_path / "model").mkdir()
    theirs.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    ours = hf.load(tmp_path / "model")
    assert logit_error(ours, theirs, 512) < TOLERANCE


def transformers_config(directory: Path) -> Any:
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    return config


BIG = 10**400
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": LINEAR_ROPE, "rope_scaling": YARN}, "say different things"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta = 10000.0, but rope_theta = 5000"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 64}, "original_max_position_embeddings = 128, and"),
        ({"rope_parameters": YARN | {"rope_theta": 1.0}}, r"attention\.rope\.theta = 1\.0: .*yarn"),
        ({"rope_theta": 1, "rope_scaling": YARN}, r"attention\.rope\.theta = 1\.0"),
        ({"rope_parameters": YARN | {"original_max_position_embeddings": 0}}, "original_max_seq_len = 0"),
        ({"rope_parameters": YARN | {"factor": 0}}, r"factor = 0\.0"),
        ({"rope_parameters": YARN | {"factor": -1}}, r"factor = -1\.0"),
        ({"rope_parameters": YARN | {"factor": "4"}}, r"rope_parameters\.factor = '4': must be a number"),
        ({"rope_parameters": YARN | {"beta_fast": float("nan")}}, r"beta_fast = nan: must be a number"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]: must be a table"),
        ({"rope_parameters": YARN | {"attention_factor": "1"}}, "attention_factor = '1'"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"rope_theta": BIG}, "rope_theta = a whole number of 401 digits"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rms_norm_eps": -1}, r"norm_eps = -1\.0"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef = inf"),
        ({"router_aux_loss_coef": 1.7e308}, r"router\.balance_loss = inf"),
        ({"num_attention_heads": 0}, r"attention\.n_heads = 0"),
        ({"num_key_value_heads": 0}, r"attention\.n_kv_heads = 0"),
        ({"hidden_size": BIG, "head_dim": 64}, "d_model = a whole number of 401 digits"),
        ({"hidden_size": 64.0}, r"hidden_size = 64\.0: must be a whole number"),
        ({"hidden_size": True}, "hidden_size = True: must be a whole number"),
        ({"vocab_size": None}, "vocab_size = None: must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes': must be true or false"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts = 4, but num_local_experts = 8"),
        ({"sliding_window": "4096"}, "sliding_window = '4096'"),
        ({"sliding_window": 0}, "sliding_window = 0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_settings_that_cannot_be_are_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HFError, match=message) as caught:
        hf.config_from_hf({"model_type": "mixtral"} | change)
    assert "\n" not in str(caught.value)


def test_plain_rope_is_found_at_the_top() -> None:
    assert hf.config_from_hf({"model_type": "mixtral", "rope_theta": 10}).attention.rope == RopeConfig(theta=10.0)


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}"])
def test_json_that_python_gives_up_on_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HFError, match=r"config\.json is not complete JSON") as caught:
        hf.read_config(tmp_path)
    assert "\n" not in str(caught.value)
