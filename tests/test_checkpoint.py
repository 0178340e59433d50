"""Checkpoints: what is saved comes back bit for bit; what is broken is named; what was there survives every failure."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moe
from moe import checkpoint
from moe.config import AttentionConfig, Config, ExpertsConfig, RouterConfig
from moe.errors import CheckpointError
from moe.io import files, tensorfiles
from moe.tokenizer import Tokenizer, train_bpe

TINY = Config(
    name="tiny",
    d_model=16,
    n_layers=2,
    vocab_size=300,
    max_seq_len=64,
    attention=AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=8),
    experts=ExpertsConfig(n_experts=4, top_k=2, d_ff=24),
)
TOKENS = torch.arange(12).view(2, 6)


def variant(**changes: object) -> Config:
    return dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["to be or not to be, that is the question"] * 3, 260)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    moe.save(moe.Transformer(TINY), tmp_path / "ckpt")
    return tmp_path / "ckpt"


def assert_same(one: moe.Transformer, other: moe.Transformer) -> None:
    assert one.cfg == other.cfg
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def assert_whole(directory: Path, model: moe.Transformer) -> None:
    """The checkpoint is `model`'s, and nothing else is left beside it."""
    assert_same(moe.load(directory), model)
    assert [entry.name for entry in directory.parent.iterdir()] == [directory.name]


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        variant(tie_embeddings=True),
        variant(experts=ExpertsConfig(n_experts=3, top_k=1, d_ff=8, activation="gelu")),
        variant(router=RouterConfig(bias_update_rate=0.01), name='odd "name"'),
    ],
    ids=["plain", "tied", "gelu", "bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_is_exact(cfg: Config, dtype: torch.dtype, tmp_path: Path) -> None:
    model = moe.Transformer(cfg, seed=3).to(dtype)
    for buffer in model.buffers():
        buffer.normal_()
    moe.save(model, tmp_path / "ckpt")
    loaded = moe.load(tmp_path / "ckpt")
    assert_same(loaded, model)
    assert (loaded.head.weight is loaded.embedding.weight) == cfg.tie_embeddings
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(TOKENS).logits_BSV, model(TOKENS).logits_BSV)
    assert checkpoint.load_config_of(tmp_path / "ckpt") == cfg


def test_files_are_ordinary_safetensors_with_tied_weights_once(tmp_path: Path) -> None:
    model = moe.Transformer(variant(tie_embeddings=True))
    moe.save(model, tmp_path / "ckpt")
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["config.toml", "model.safetensors"]
    tensors = load_file(tmp_path / "ckpt" / "model.safetensors")
    assert "head.weight" not in tensors
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("limit", [1, 20_000, 10**6])
def test_shards_keep_to_the_limit(limit: int, tmp_path: Path) -> None:
    model = moe.Transformer(TINY)
    moe.save(model, tmp_path / "ckpt", max_shard_bytes=limit)
    shards = sorted((tmp_path / "ckpt").glob("*.safetensors"))
    tensors = [load_file(shard) for shard in shards]
    assert all(len(t) == 1 or sum(x.nbytes for x in t.values()) <= limit for t in tensors)
    if limit == 10**6:
        assert [s.name for s in shards] == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "ckpt" / "model.safetensors.index.json").read_text())
        assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        placed = {name: s.name for s, t in zip(shards, tensors, strict=True) for name in t}
        assert index["weight_map"] == placed
    assert_whole(tmp_path / "ckpt", model)


def test_load_converts_parameters_and_keeps_buffers(tmp_path: Path) -> None:
    moe.save(moe.Transformer(variant(router=RouterConfig(bias_update_rate=0.01))), tmp_path / "ckpt")
    loaded = moe.load(tmp_path / "ckpt", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}


def test_loaded_weights_outlive_their_files(saved: Path) -> None:
    model = moe.load(saved)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with (saved / "model.safetensors").open("r+b") as file:
        file.truncate(10)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    moe.save(moe.Transformer(TINY), tmp_path / "ckpt", tokenizer=tokenizer)
    assert moe.load_tokenizer(tmp_path / "ckpt").fingerprint == tokenizer.fingerprint


def test_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer, saved: Path, tmp_path: Path) -> None:
    small = moe.Transformer(variant(vocab_size=259))
    with pytest.raises(CheckpointError, match=r"260 ids.*vocab_size = 259"):
        moe.save(small, tmp_path / "small", tokenizer=tokenizer)
    assert not (tmp_path / "small").exists()
    moe.save(small, tmp_path / "small")
    tokenizer.save(tmp_path / "small" / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"260 ids.*vocab_size = 259"):
        moe.load_tokenizer(tmp_path / "small")


def test_missing_or_broken_tokenizer_is_named(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*saved without one"):
        moe.load_tokenizer(saved)
    (saved / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not complete JSON"):
        moe.load_tokenizer(saved)


# ---------------------------------------------------------------------------------------------------- broken, foreign


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        moe.load(saved)


def test_missing_things_are_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: no such directory"):
        moe.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="is not a directory"):
        moe.load(saved / "config.toml")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        moe.load(saved)
    (saved / "config.toml").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        moe.load(saved)


def test_missing_shard_and_bad_index_are_named(tmp_path: Path) -> None:
    directory = tmp_path / "ckpt"
    moe.save(moe.Transformer(TINY), directory, max_shard_bytes=20_000)
    index = directory / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("model-00001", "../ckpt/model-00001"))
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        moe.load(directory)
    index.write_text(good[:50])
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        moe.load(directory)
    index.write_text(good.replace('"norm.weight"', '"ghost.weight"'))
    with pytest.raises(CheckpointError, match=r"do not hold: ghost\.weight"):
        moe.load(directory)
    index.write_text(good)
    next(directory.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-\d+\.safetensors is missing"):
        moe.load(directory)


def test_foreign_names_are_listed(saved: Path) -> None:
    save_file({"model.layers.0.x": torch.zeros(1), "norm.weight": torch.ones(16)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing \(embedding\.weight, .*model\.layers\.0\.x.*moe\.hf\.load"):
        moe.load(saved)


def test_hugging_face_directory_points_to_hf_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"moe\.hf\.load"):
        moe.load(tmp_path)


def test_wrong_shapes_name_both(saved: Path) -> None:
    config = saved / "config.toml"
    config.write_text(config.read_text().replace("d_ff = 24", "d_ff = 32"))
    with pytest.raises(
        CheckpointError, match=r"w_in_EGFD is \[4, 2, 24, 16\], the configuration makes it \[4, 2, 32, 16"
    ):
        moe.load(saved)
    config.write_text(config.read_text().replace("d_ff", "dff"))
    with pytest.raises(CheckpointError, match=r"config\.toml.*did you mean"):
        moe.load(saved)


def test_unknown_dtype_is_named(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"F8_E4M3.*quantised"):
        moe.load(saved)


@pytest.mark.parametrize("kept", ["embedding.weight", "head.weight"])
def test_tied_weights_may_have_either_name(kept: str, tmp_path: Path) -> None:
    model = moe.Transformer(variant(tie_embeddings=True), seed=1)
    moe.save(model, tmp_path / "ckpt")
    file = tmp_path / "ckpt" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors.pop("embedding.weight")
    save_file(tensors | {kept: weight}, file)
    assert_same(moe.load(tmp_path / "ckpt"), model)
    save_file(tensors | {"embedding.weight": weight, "head.weight": weight.clone()}, file)
    loaded = moe.load(tmp_path / "ckpt")
    assert_same(loaded, model)
    assert loaded.head.weight is loaded.embedding.weight
    save_file(tensors | {"embedding.weight": weight, "head.weight": weight + 1}, file)
    with pytest.raises(
        CheckpointError, match=r"tied, but head\.weight differs .*tie_embeddings = false in config\.toml"
    ):
        moe.load(tmp_path / "ckpt")


def test_two_sets_of_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    other = moe.Transformer(TINY, seed=1)
    moe.save(other, tmp_path / "shards", max_shard_bytes=20_000)
    shutil.copytree(tmp_path / "shards", saved, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"two sets of weights, model\.safetensors .*model-00001-of-"):
        moe.load(saved)
    moe.save(other, saved)  # replaces all of it
    assert sorted(p.name for p in saved.iterdir()) == ["config.toml", "model.safetensors"]
    assert_same(moe.load(saved), other)
    (saved / "model-00007-of-00009.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    assert_same(moe.load(saved), other)  # what nothing names is not read


# ---------------------------------------------------------------------------------------------------------- replacing


def test_saving_again_replaces_whole(saved: Path) -> None:
    sharded, single = moe.Transformer(TINY, seed=1), moe.Transformer(variant(n_layers=1), seed=2)
    moe.save(sharded, saved, max_shard_bytes=20_000)
    assert_whole(saved, sharded)
    moe.save(single, saved)
    assert_whole(saved, single)
    assert sorted(p.name for p in saved.iterdir()) == ["config.toml", "model.safetensors"]


def test_replacing_works_without_an_exchange(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    model = moe.Transformer(TINY, seed=1)
    moe.save(model, saved)
    assert_whole(saved, model)


def test_empty_directory_and_symbolic_link_are_filled(tmp_path: Path) -> None:
    model = moe.Transformer(TINY)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    moe.save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(moe.load(tmp_path / "real"), model)


def test_what_is_not_a_checkpoint_is_never_replaced(saved: Path, tmp_path: Path) -> None:
    model = moe.Transformer(TINY, seed=1)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.toml").write_text("precious")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        moe.save(model, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "config.toml").read_text() == "precious"
    with pytest.raises(CheckpointError, match="is a file"):
        moe.save(model, tmp_path / "thesis" / "config.toml")
    (saved / "notes.md").write_text("precious")
    with pytest.raises(CheckpointError, match=r"more than a checkpoint.*notes\.md"):
        moe.save(model, saved)
    assert (saved / "notes.md").read_text() == "precious"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_failure_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = tensorfiles._write_file

    def fails(path: Path, *args: object) -> None:
        real(path, *args)  # type: ignore[arg-type]
        raise error

    monkeypatch.setattr(tensorfiles, "_write_file", fails)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left.*free some space" if isinstance(error, OSError) else None):
        moe.save(moe.Transformer(TINY, seed=1), saved)
    with pytest.raises(expected):
        moe.save(moe.Transformer(TINY, seed=1), saved.parent / "new")
    assert_whole(saved, moe.Transformer(TINY))


def test_file_size_limit_leaves_what_was_there(saved: Path) -> None:
    script = """if True:
        import resource, sys, moe
        cfg = moe.load(sys.argv[1]).cfg
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            moe.save(moe.Transformer(cfg, seed=1), sys.argv[1])
        except ValueError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert "nothing half-written" in done.stdout
    assert_whole(saved, moe.Transformer(TINY))


def as_version_1(directory: Path) -> None:
    """Rewrites a checkpoint as the first version had it: the experts' weights were the MoE's own, and no version."""
    for file in directory.glob("model*.safetensors"):
        old = {name.replace(".moe.experts.", ".moe."): tensor for name, tensor in load_file(file).items()}
        save_file(old, file, {"format": "pt"})
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(index.read_text().replace(".moe.experts.", ".moe."))


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_checkpoints_of_the_first_version_are_read(tmp_path: Path, shard_bytes: int) -> None:
    model = moe.Transformer(TINY, seed=3)
    moe.save(model, tmp_path / "old", max_shard_bytes=shard_bytes)
    as_version_1(tmp_path / "old")
    assert_same(moe.load(tmp_path / "old"), model)
    stored = tensorfiles.list_tensors(tmp_path / "old")
    assert any(".moe.w_in_EGFD" in name for name in stored)
    assert all(tensor.metadata.get(checkpoint.VERSION_KEY) is None for tensor in stored.values())


@pytest.mark.parametrize("version", ["3", "two"])
def test_a_newer_version_is_an_error(saved: Path, version: str) -> None:
    file = saved / "model.safetensors"
    for tensor in tensorfiles.list_tensors(saved).values():
        assert tensor.metadata == {"format": "pt", checkpoint.VERSION_KEY: "2"}
    save_file(load_file(file), file, {"format": "pt", checkpoint.VERSION_KEY: version})
    with pytest.raises(CheckpointError, match=f"is a checkpoint of version {version}, .* up to 2: use the gpt4-moe"):
        moe.load(saved)


def test_killed_writers_leave_a_whole_directory(tmp_path: Path) -> None:
    script = """if True:
        import itertools, sys
        from moe.io.files import atomic_directory
        for i in itertools.count():
            with atomic_directory(sys.argv[1]) as temporary:
                (temporary / "a").write_text(str(i))
                (temporary / "b").write_text(str(i))
    """
    place = tmp_path / "place"
    for delay in (0.0, 0.003, 0.011, 0.024, 0.05):
        writer = subprocess.Popen([sys.executable, "-c", script, str(place)])
        deadline = time.monotonic() + 20
        while not (place / "b").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert (place / "a").read_text() == (place / "b").read_text() != ""
        shutil.rmtree(place)


def test_models_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        empty = moe.Transformer(TINY)
    with pytest.raises(CheckpointError, match="meta device"):
        moe.save(empty, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="itself, not what wraps it"):
        moe.save(torch.compile(moe.Transformer(TINY)), tmp_path / "ckpt")  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
