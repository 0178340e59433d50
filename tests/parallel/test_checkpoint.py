"""moe.parallel.checkpoint: what is saved on one mesh goes on on any other; nothing is lost, dropped or half-written."""

import dataclasses
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe
from moe.config import Config
from moe.errors import CheckpointError, ConfigError
from moe.model import Counts, Transformer, objective
from moe.parallel import checkpoint, convert
from moe.parallel.apply import parallelize
from moe.parallel.checkpoint import Checkpointer, latest
from moe.parallel.degrees import Degrees
from moe.parallel.mesh import make_meshes
from moe.parallel.pipeline import Pipeline
from moe.parallel.step import Batch, clip_gradients, forward_backward, gradient_norm
from moe.weights import init_weights
from tests.conftest import rel, tiny_config
from tests.parallel import ranks
from tests.parallel.test_parallelize import config

B, S = 8, 16
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def batch_at(step: int, V: int = 61) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(V, (B, S + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def made(cfg: Config, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(cfg).to(dtype)
    model.to_empty(device="cpu")
    init_weights(model, 7)
    return model


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), **settings)


def train(model: Transformer, optimizer: torch.optim.Optimizer, begin: int, end: int) -> list[float]:
    """In one process, from one step to another; the losses."""
    losses = []
    for step in range(begin, end):
        tokens, targets = batch_at(step, model.cfg.vocab_size)
        loss = objective(model.cfg.router, model(tokens, targets).sums, Counts(B * S, B, B * S))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and moments by name."""
    found = {name: t.clone() for name, t in model.state_dict().items()}
    for name, p in model.named_parameters():
        found |= {f"{name}:{key}": t.clone() for key, t in optimizer.state.get(p, {}).items()}
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


# ---------------------------------------------------------------------------------------------------- other meshes


def train_on_ranks(
    cfg: Config, degrees: Degrees, dtype: str, directory: Path, begin: int, end: int, saved: tuple[int, ...]
) -> list[float]:
    """As `train`, on a mesh; goes on from the newest checkpoint, and saves after some steps, while it goes on."""
    meshes = make_meshes(degrees, torch.device("cpu"))
    if degrees.pp > 1:
        pipeline = Pipeline(cfg, meshes, seed=7, dtype=DTYPES[dtype])
        parts, parameters = pipeline.parts, pipeline.parameters()
    else:
        model = parallelize(made(cfg, DTYPES[dtype]), meshes)
        parts, parameters = [model], list(model.parameters())
    optimizers = [adamw(part) for part in parts]
    losses = []
    mine = slice(*(meshes.data.get_local_rank() * B // degrees.dp + n for n in (0, B // degrees.dp)))
    with Checkpointer(directory, cfg) as checkpointer:
        training = checkpointer.load(parts, optimizers)
        assert (training or {"sample": 0})["sample"] == begin * B
        for step in range(begin, end):
            tokens, targets = batch_at(step, cfg.vocab_size)
            batch = Batch(tokens[mine], targets[mine])
            done = pipeline.forward_backward(batch) if degrees.pp > 1 else forward_backward(parts[0], meshes, batch)
            losses.append(objective(cfg.router, done.sums, done.counts).item())
            clip_gradients(parameters, gradient_norm(parameters, meshes), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if step + 1 in saved:
                checkpointer.save(step + 1, parts, optimizers, {"sample": (step + 1) * B})
    dist.barrier()
    return losses


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (Degrees(pp=2, tp=2), Degrees(dp_shard=4, ep=2), "fp64"),
        pytest.param(
            Degrees(dp_shard=2),
            Degrees(pp=2, dp_shard=2, ep=2, schedule="interleaved-1f1b"),
            "fp64",
            marks=pytest.mark.slow,
        ),
        (Degrees(dp_shard=4, ep=2), Degrees(tp=2), "fp32"),
    ],
    ids=str,
)
def test_a_run_goes_on_on_another_mesh(first: Degrees, second: Degrees, dtype: str, tmp_path: Path) -> None:
    """Three steps on one mesh, two on another, the last checkpoint in this process: all as in one process."""
    cfg = config(n_layers=5) if second.pp > 1 else config()
    reference = made(cfg, DTYPES[dtype])
    optimizer = adamw(reference)
    want = train(reference, optimizer, 0, 5)
    near = {"fp64": 1e-12, "fp32": 1e-6}[dtype]
    got = ranks.run(first.world, train_on_ranks, cfg, first, dtype, tmp_path, 0, 3, (2, 3))[0]
    got += ranks.run(second.world, train_on_ranks, cfg, second, dtype, tmp_path, 3, 5, (5,))[0]
    assert max(abs(g / w - 1) for g, w in zip(got, want, strict=True)) < near
    here = made(cfg, DTYPES[dtype])
    other = adamw(here)
    training = Checkpointer(tmp_path).load([here], [other])
    assert training == {"step": 5, "world": second.world, "sample": 5 * B}
    expected = state_of(reference, optimizer)
    loaded = state_of(here, other)
    assert loaded.keys() == expected.keys()
    # Adam divides a gradient by its own size, so that one which is nearly 0 is rounding alone.
    worst = {name: rel(loaded[name], expected[name]) for name in expected}
    assert max(worst.values()) < {"fp64": 1e-8, "fp32": 1e-3}[dtype], max(worst, key=worst.__getitem__)


def load_and_save(cfg: Config, degrees: Degrees, source: Path, target: Path) -> None:
    model = parallelize(made(cfg, torch.float32), make_meshes(degrees, torch.device("cpu")))
    optimizer = adamw(model)
    training = Checkpointer(source).load([model], [optimizer])
    assert training is not None
    Checkpointer(target, asynchronous=False).save(9, [model], [optimizer])


def test_resharding_changes_no_bit(tmp_path: Path) -> None:
    cfg = config()
    model = made(cfg, torch.float32)
    optimizer = adamw(model)
    train(model, optimizer, 0, 2)
    Checkpointer(tmp_path / "a", asynchronous=False).save(2, [model], [optimizer])
    ranks.run(4, load_and_save, cfg, Degrees(tp=2, dp_shard=2, ep=2), tmp_path / "a", tmp_path / "b")
    other = made(cfg, torch.float32)
    again = adamw(other)
    Checkpointer(tmp_path / "b").load([other], [again])
    assert_same(state_of(other, again), state_of(model, optimizer))


def disagree(directory: Path) -> str:
    """Each rank with a model of its own, and a checkpoint of the first's."""
    layers = 2 + dist.get_rank()
    model = Transformer(tiny_config(n_layers=layers))
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(directory).load([model])
    return str(caught.value)


def test_what_one_rank_misses_all_ranks_say(tmp_path: Path) -> None:
    Checkpointer(tmp_path, asynchronous=False).save(1, [Transformer(tiny_config())])
    said = ranks.run(2, disagree, tmp_path)
    assert said[0] == said[1]
    assert "are missing in it (model.blocks.2." in said[0]


# ------------------------------------------------------------------------------------------------------ one process


@pytest.fixture
def pair() -> tuple[Transformer, torch.optim.Optimizer]:
    """After two steps."""
    model = Transformer(tiny_config())
    optimizer = adamw(model)
    train(model, optimizer, 0, 2)
    return model, optimizer


def new(cfg: Config | None = None, **settings: Any) -> tuple[Transformer, torch.optim.Optimizer]:
    model = Transformer(cfg or tiny_config(), seed=3)
    return model, adamw(model, **settings)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_everything_comes_back(pair: Any, tmp_path: Path, asynchronous: bool) -> None:
    model, optimizer = pair
    optimizer.param_groups[0]["lr"] = 0.125
    want = state_of(model, optimizer)
    training = {"sample": 24, "tokens": 384, "fingerprint": "abc", "meter": {"counts": torch.arange(3)}}
    torch.manual_seed(11)
    with Checkpointer(tmp_path, model.cfg, asynchronous=asynchronous) as checkpointer:
        checkpointer.save(2, [model], [optimizer], training)
        drawn = torch.rand(3)
        train(model, optimizer, 2, 4)  # while it is written
        training["meter"]["counts"] += 1
    other, again = new()
    loaded = Checkpointer(tmp_path).load([other], [again])
    assert_same(state_of(other, again), want)
    assert torch.equal(torch.rand(3), drawn)
    assert again.param_groups[0]["lr"] == 0.125
    assert again.param_groups[0]["betas"] == (0.9, 0.95)
    assert loaded is not None
    assert torch.equal(loaded.pop("meter")["counts"], torch.arange(3))
    assert loaded == {"step": 2, "world": 1, "sample": 24, "tokens": 384, "fingerprint": "abc"}
    assert latest(tmp_path) == tmp_path / "step-000002"


def test_tied_weights_and_a_second_optimizer(tmp_path: Path) -> None:
    from moe.config import TrainConfig
    from moe.train.optimizer import build

    model, other = (Transformer(tiny_config(tie_embeddings=True), seed=s) for s in (0, 3))
    settings = TrainConfig(optimizer="muon")
    one, two = build(model, settings), build(other, settings)
    train(model, one, 0, 2)  # type: ignore[arg-type]
    Checkpointer(tmp_path, asynchronous=False).save(2, [model], one.parts)
    Checkpointer(tmp_path).load([other], two.parts)
    for a, b in zip(one.parts, two.parts, strict=True):
        assert_same(state_of(other, b), state_of(model, a))
    assert other.head.weight is other.embedding.weight
    assert train(other, two, 2, 4) == train(model, one, 2, 4)  # type: ignore[arg-type]


def test_an_optimizer_that_has_made_no_step(tmp_path: Path) -> None:
    model, optimizer = new()
    Checkpointer(tmp_path, asynchronous=False).save(0, [model], [optimizer])
    assert not optimizer.state
    other, again = new()
    train(other, again, 0, 1)
    Checkpointer(tmp_path).load([other], [again])
    assert all(not again.state.get(p) for p in other.parameters())
    assert train(other, again, 0, 2) == train(model, optimizer, 0, 2)


def test_a_loaded_step_is_not_written_again(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, [model], [optimizer])
        checkpointer.wait()
        written = (tmp_path / "step-000002" / ".metadata").stat().st_mtime_ns
        checkpointer.save(2, [model], [optimizer])
    resumed = Checkpointer(tmp_path)
    resumed.load([model], [optimizer])
    resumed.save(2, [model], [optimizer], wait=True)
    assert (tmp_path / "step-000002" / ".metadata").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("cfg", "settings", "complaint"),
    [
        (tiny_config(n_layers=3), {}, r"entries are missing in it \(model.blocks.2"),
        (tiny_config(n_layers=1), {}, r"have no place here \(model.blocks.1.* of another|have no place here \(model"),
        (tiny_config(vocab_size=60), {}, r"embedding.weight is \[61, 24\], here it is \[60, 24\]"),
        (tiny_config(), {"amsgrad": True}, r"missing in it \(optimizer.state.blocks.0.*max_exp_avg_sq"),
    ],
)
def test_another_model_is_an_error_that_names_it(
    pair: Any, tmp_path: Path, cfg: Config, settings: dict[str, Any], complaint: str
) -> None:
    model, optimizer = pair
    Checkpointer(tmp_path, asynchronous=False).save(2, [model], [optimizer])
    other, again = new(cfg, **settings)
    with pytest.raises(CheckpointError, match=complaint):
        Checkpointer(tmp_path).load([other], [again])


def test_moments_are_never_dropped(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    Checkpointer(tmp_path, asynchronous=False).save(2, [model], [optimizer])
    other = Transformer(model.cfg)
    sgd = torch.optim.SGD(other.parameters(), lr=1.0)
    with pytest.raises(CheckpointError, match=r"no place here \(optimizer.state.*exp_avg"):
        Checkpointer(tmp_path).load([other], [sgd])
    Checkpointer(tmp_path / "weights", asynchronous=False).save(2, [model])
    with pytest.raises(CheckpointError, match=r"missing in it \(optimizer.settings"):
        Checkpointer(tmp_path / "weights").load([other], [adamw(other)])
    Checkpointer(tmp_path).load([other])  # the weights alone, as asked for
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_parts_and_optimizers_go_together(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    with pytest.raises(ConfigError, match="not all of one part"):
        Checkpointer(tmp_path).save(1, [model.embedding, model.blocks], [optimizer])
    with pytest.raises(ConfigError, match="two parts of the model both have"):
        Checkpointer(tmp_path).save(1, [model, model])
    for name in ("keep_last", "keep_every"):
        with pytest.raises(ConfigError, match=f"{name} = -1"):
            Checkpointer(tmp_path, **{name: -1})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------- damage, failures, room


def spoil(place: Path, how: str) -> None:
    file = place / "__0_0.distcp"
    content = file.read_bytes()
    if how == "cut short":
        file.write_bytes(content[:-100])
    elif how == "a bit":
        content = bytearray(content)
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    elif how == "metadata":
        (place / ".metadata").write_bytes(b"\0" * 50)
    elif how == "training":
        (place / "training.pt").write_bytes(b"")
    else:
        (place / ".metadata").unlink()


SPOILT = {
    "cut short": "__0_0.distcp has not the content",
    "a bit": "__0_0.distcp has not the content",
    "gone": "__0_0.distcp: No such file",
    "metadata": ".metadata cannot be read",
    "training": "training.pt has not the content",
    "unfinished": "unfinished",
}


@pytest.mark.parametrize("how", SPOILT)
def test_the_one_before_is_taken(pair: Any, tmp_path: Path, how: str) -> None:
    model, optimizer = pair
    checkpointer = Checkpointer(tmp_path, asynchronous=False)
    checkpointer.save(2, [model], [optimizer])
    want = state_of(model, optimizer)
    train(model, optimizer, 2, 3)
    checkpointer.save(3, [model], [optimizer])
    spoil(tmp_path / "step-000003", how)
    other, again = new()
    resumed = Checkpointer(tmp_path, keep_last=1, asynchronous=False)
    with pytest.warns(UserWarning, match=SPOILT[how]):
        training = resumed.load([other], [again])
    assert training is not None
    assert training["step"] == 2
    assert_same(state_of(other, again), want)
    train(other, again, 2, 3)
    resumed.save(3, [other], [again])  # in its place
    whole = Checkpointer(tmp_path)
    assert (whole.load([model], [optimizer]) or {})["step"] == 3
    assert_same(state_of(other, again), state_of(model, optimizer))


def test_none_is_whole(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    assert Checkpointer(tmp_path / "empty").load([model], [optimizer]) is None
    Checkpointer(tmp_path, asynchronous=False).save(2, [model], [optimizer])
    spoil(tmp_path / "step-000002", "a bit")
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        Checkpointer(tmp_path).load([model], [optimizer])
    spoil(tmp_path / "step-000002", "unfinished")
    with pytest.warns(UserWarning, match="unfinished"):
        assert Checkpointer(tmp_path).load([model], [optimizer]) is None


def test_an_older_step_and_another_version(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = pair
    checkpointer = Checkpointer(tmp_path, asynchronous=False)
    for step in (2, 3):
        checkpointer.save(step, [model], [optimizer])
    assert (checkpointer.load([model], [optimizer], step=2) or {})["step"] == 2
    with pytest.raises(CheckpointError, match="step-000007 is not a whole checkpoint"):
        checkpointer.load([model], [optimizer], step=7)
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(CheckpointError, match="of version 1, and this gpt4-moe knows 2"):
        checkpointer.load([model], [optimizer])


def names(directory: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in directory.glob("step-*"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_which_are_kept(pair: Any, tmp_path: Path, asynchronous: bool) -> None:
    model, optimizer = pair
    with Checkpointer(tmp_path, keep_last=2, keep_every=3, asynchronous=asynchronous) as checkpointer:
        for step in range(1, 9):
            checkpointer.save(step, [model], [optimizer])
    assert names(tmp_path) == [3, 6, 7, 8]


def test_none_is_deleted_before_a_newer_one_is_whole(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    checkpointer = Checkpointer(tmp_path, keep_last=1, asynchronous=False)
    checkpointer.save(1, [model], [optimizer])
    (tmp_path / "step-000002").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"cannot write .*step-000002: .*File exists"):
        checkpointer.save(2, [model], [optimizer])
    assert (tmp_path / "step-000001" / ".metadata").is_file()
    checkpointer.save(3, [model], [optimizer])
    assert names(tmp_path) == [2, 3]


def test_a_failed_save_is_reported_at_the_next_one_or_at_the_end(pair: Any, tmp_path: Path) -> None:
    model, optimizer = pair
    for step in (1, 3):
        (tmp_path / f"step-{step:06d}").write_text("in the way")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [model], [optimizer])
    with pytest.raises(CheckpointError, match="step-000001"):
        checkpointer.save(2, [model], [optimizer])
    checkpointer.save(2, [model], [optimizer])
    checkpointer.save(3, [model], [optimizer])
    with pytest.raises(CheckpointError, match="step-000003"):
        checkpointer.close()
    assert latest(tmp_path) == tmp_path / "step-000002"


# ------------------------------------------------------------------------------------------------------- conversion


def save_on_ranks(cfg: Config, directory: Path) -> None:
    model = parallelize(made(cfg, torch.float32), make_meshes(Degrees(dp_shard=2, ep=2), torch.device("cpu")))
    with Checkpointer(directory, cfg) as checkpointer:
        checkpointer.save(1, [model], [adamw(model)])


def test_export_and_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    model = made(cfg, torch.float32)
    ranks.run(2, save_on_ranks, cfg, tmp_path)
    before: list[weakref.ref[Tensor]] = []
    read = convert._Reader.read

    def watched(*args: Any) -> Tensor:
        assert all(tensor() is None for tensor in before), "an earlier tensor is still held"
        found = read(*args)
        before.append(weakref.ref(found))
        return found

    monkeypatch.setattr(convert._Reader, "read", watched)
    convert.export(tmp_path / "step-000001", tmp_path / "exported", max_shard_bytes=20_000)
    loaded = moe.load(tmp_path / "exported")
    assert loaded.cfg == cfg
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    moe.save(model, tmp_path / "saved")
    assert {t.name for t in (tmp_path / "saved").iterdir()} >= {"config.toml"}
    convert.divide(tmp_path / "saved", tmp_path / "divided")
    other = Transformer(cfg, seed=1)
    checkpoint.load(tmp_path / "divided", [other])
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_conversion_of_tied_weights(tmp_path: Path) -> None:
    cfg = tiny_config(tie_embeddings=True)
    model = Transformer(cfg)
    moe.save(model, tmp_path / "saved")
    convert.divide(tmp_path / "saved", tmp_path / "divided")
    convert.export(tmp_path / "divided", tmp_path / "exported")
    assert_same(dict(moe.load(tmp_path / "exported").state_dict()), dict(model.state_dict()))


def test_what_cannot_be_converted(pair: Any, tmp_path: Path) -> None:
    model, _ = pair
    Checkpointer(tmp_path, asynchronous=False).save(1, [model])
    with pytest.raises(CheckpointError, match=r"no config\.toml"):
        convert.export(tmp_path / "step-000001", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no \.metadata"):
        convert.export(tmp_path, tmp_path / "out")
    other = dataclasses.replace(model.cfg, n_layers=3)
    Checkpointer(tmp_path, other, asynchronous=False).save(2, [model])
    with pytest.raises(CheckpointError, match=r"tensors are missing \(blocks.2"):
        convert.export(tmp_path / "step-000002", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moe.save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="exists"):
        convert.divide(tmp_path / "saved", tmp_path / "saved")
