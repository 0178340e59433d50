"""Fine-tuning through the training loop: responses alone are learned, LoRA, resuming, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

import moe
from moe import Config, checkpoint
from moe.data import ConversationData, ConversationStream, prepare_conversations
from moe.data.mixture import IGNORE
from moe.errors import ConfigError
from moe.lora import LoraConfig, load_adapter, merged
from moe.model import Transformer
from moe.tokenizer import train_bpe
from moe.train import loop, train
from moe.train.finetune import recipe
from tests.conftest import rel, run_cli

ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "pig", "ant")
SOUNDS = ("meow", "woof", "hoot", "yip", "cluck", "moo", "oink", "none")
LORA = LoraConfig(rank=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ConversationData:
    """What animals say, asked in thirty ways."""
    place = tmp_path_factory.mktemp("finetune")
    rows = [
        {"prompt": f"{i} what does the {animal} say", "response": sound}
        for i in range(30)
        for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
    ]
    (place / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_bpe([" ".join([*ANIMALS, *SOUNDS, "what does the say user assistant\n"]) * 30], 300)
    return prepare_conversations([place / "animals.jsonl"], place / "data", tokenizer=tokenizer).data


@pytest.fixture
def base(cfg: Config, data: ConversationData, tmp_path: Path) -> Path:
    model = Transformer(cfg.with_overrides(["max_seq_len=64"]), seed=5)
    checkpoint.save(model, tmp_path / "base", tokenizer=data.tokenizer())
    return tmp_path / "base"


@pytest.fixture
def short(base: Path, data: ConversationData) -> Config:
    """Eight steps of 4 windows."""
    changes = ["steps=8", "seq_len=48", "batch_size=4", "micro_batch=2", "lr=1e-2", "log_every=1", "save_every=4"]
    changes.append("dtype=fp32")
    return recipe(base, data, epochs=1, lora=True, overrides=[f"train.{c}" for c in [*changes, "eval_tokens=512"]])


def records(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_fine_tune_learns_the_responses(
    short: Config, data: ConversationData, base: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    cfg = short.with_overrides(["train.steps=24"])
    result = train(cfg, data.path, tmp_path / "run", start_from=base, lora=lora)
    evals = records(tmp_path / "run", "eval")
    assert result.status == "complete"
    # Adapters cannot change the random output layer, so they learn less of an untrained model.
    fraction = 0.7 if lora is None else 0.95
    assert evals[-1]["bits_per_byte"]["animals"] < fraction * evals[0]["bits_per_byte"]["animals"]
    assert result.summary["chat"]
    final = moe.load(tmp_path / "run" / "final")
    if lora is not None:
        again = moe.load(base)
        assert load_adapter(again, tmp_path / "run") == lora
        tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
        assert torch.equal(merged(again)(tokens).logits_BSV, final(tokens).logits_BSV)
    else:
        assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert "what does the" in (tmp_path / "run" / "samples.txt").read_text()


@pytest.mark.parametrize(("has_bf16", "tolerance"), [("0", 1e-6), ("1", 5e-3)])
def test_the_first_loss_is_that_of_the_responses_each_seen_alone(
    short: Config,
    data: ConversationData,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    has_bf16: str,
    tolerance: float,
) -> None:
    """The loop's first batch, packed and in micro-batches, against every conversation passed by itself."""
    monkeypatch.setenv("GPT4_MOE_CPU_BF16", has_bf16)
    short = short.with_overrides(["train.dtype=auto", "train.steps=1"])
    train(short, data.path, tmp_path / "run", start_from=base, lora=LORA)
    batch = ConversationStream(data, 48, short.train.seed).batch(0, 4)
    assert batch.documents is not None
    model, total, count = moe.load(base).double(), 0.0, 0
    for inputs, targets, documents in zip(*map(torch.from_numpy, batch[:3]), strict=True):
        for number in documents.unique():
            here = documents == number
            if (targets[here] == IGNORE).all():
                continue
            logits = model(inputs[here].unsqueeze(0)).logits_BSV[0]
            total += torch.nn.functional.cross_entropy(logits, targets[here], reduction="sum").item()
            count += int((targets[here] != IGNORE).sum())
    assert records(tmp_path / "run", "train")[0]["lm"] == pytest.approx(total / count, rel=tolerance)


def test_padding_counts_nowhere(data: ConversationData, cfg: Config, tmp_path: Path) -> None:
    """Losses, loads, biases, tokens: of one window that is mostly padding, as of its conversation alone."""
    batch = ConversationStream(data, 64, 0).batch(0, 1)
    assert batch.text is not None
    n = int(batch.text.sum())
    base = tmp_path / "base"
    biased = cfg.with_overrides(["max_seq_len=64", "router.bias_update_rate=0.01"])
    checkpoint.save(Transformer(biased, seed=5), base, tokenizer=data.tokenizer())
    changes = ["steps=1", "seq_len=64", "batch_size=1", "micro_batch=1", "dtype=fp32", "eval_every=0", "log_every=1"]
    overrides = [f"train.{change}" for change in changes]
    train(recipe(base, data, epochs=1, lora=True, overrides=overrides), data.path, tmp_path / "run", start_from=base)
    (record,) = records(tmp_path / "run", "train")
    assert n < 60
    assert record["tokens"] == record["batch_tokens"] == n

    model = moe.load(base)
    tokens, targets, documents = (torch.from_numpy(x[:, :n]) for x in batch[:3])  # type: ignore[index]
    out = model(tokens, targets, documents_BS=documents)
    for name, value in out.losses.items():
        assert record[name] == pytest.approx(value.item(), rel=1e-5), name
    counts_LE = torch.stack([r.counts_E for r in out.routing])
    assert rel(torch.tensor(record["load"]), counts_LE / counts_LE.sum(1, keepdim=True)) < 1e-6
    for block, counts_E in zip(moe.load(tmp_path / "run" / "final").blocks, counts_LE, strict=True):
        want = 0.01 * torch.sign(counts_E.double().mean() - counts_E.double())
        assert rel(block.moe.router.bias_E, want) < 1e-6  # type: ignore[union-attr]


def test_a_fine_tune_is_evaluated_as_it_was_trained(
    data: ConversationData, base: Path, short: Config, tmp_path: Path
) -> None:
    train(short, data.path, tmp_path / "run", start_from=base)
    out = tmp_path / "eval.json"
    assert run_cli("eval", tmp_path / "run" / "final", "--data", data.path, "--out", out) == 0
    found = json.loads(out.read_text())["data"]["scores"]["animals"]["bits_per_byte"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found == pytest.approx(summary["bits_per_byte"]["animals"], rel=1e-5)


def test_an_interrupted_fine_tune_goes_on_to_the_same_weights(
    short: Config, data: ConversationData, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(short, data.path, tmp_path / "whole", start_from=base, lora=LORA)
    step = loop._train_step

    def interrupted(run, traced) -> None:
        step(run, traced)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(loop, "_train_step", interrupted)
    part = train(short, data.path, tmp_path / "part", start_from=base, lora=LORA)
    assert (part.status, part.step) == ("stopped", 3)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"holds a run with LoRA .* and this is one without LoRA"):
        train(short, data.path, tmp_path / "part", start_from=base)
    assert train(short, data.path, tmp_path / "part", start_from=base, lora=LORA).status == whole.status == "complete"
    for one, other in zip(*(moe.load(tmp_path / n / "final").parameters() for n in ("whole", "part")), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="holds a run with LoRA"):
        train(short, data.path, tmp_path / "part", start_from=base, lora=LoraConfig(rank=2))


def test_adapters_need_a_model_to_begin_with(short: Config, data: ConversationData, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora without start_from"):
        train(short, data.path, tmp_path / "run", lora=LORA)


def test_conversations_of_another_tokenizer_are_refused(short: Config, data: ConversationData, tmp_path: Path) -> None:
    other = train_bpe(["entirely other words and so on " * 30], 275)
    checkpoint.save(Transformer(short.with_overrides(["max_seq_len=64"])), tmp_path / "base", tokenizer=other)
    with pytest.raises(ConfigError, match="trained with another tokenizer"):
        train(short, data.path, tmp_path / "run", start_from=tmp_path / "base", lora=LORA)


def test_without_held_out_conversations_training_goes_on(short: Config, data: ConversationData, base, tmp_path) -> None:
    (tmp_path / "few.jsonl").write_text(json.dumps({"prompt": "what does the cat say", "response": "meow"}) + "\n")
    few = prepare_conversations([tmp_path / "few.jsonl"], tmp_path / "few", tokenizer=data.tokenizer()).data
    assert few.n_tokens("few", "val") == 0
    assert "no conversation is held out" in few.index["notices"][0]
    result = train(short, few.path, tmp_path / "run", start_from=base)
    assert result.status == "complete"
    assert result.summary["bits_per_byte"] == {}


def test_the_recipe_counts_its_steps_in_epochs(base: Path, data: ConversationData) -> None:
    windows = ConversationStream(data, 64, 0).windows_per_epoch
    cfg = recipe(base, data, epochs=3, lora=False, overrides=["train.batch_size=2"])
    assert cfg.train.seq_len == 64  # the model's context, as it is below the default
    assert cfg.train.steps == -(-3 * windows // 2)
    assert cfg.train.document_mask
    assert recipe(base, data, epochs=3, lora=False, overrides=["train.steps=7"]).train.steps == 7
    assert recipe(base, data, epochs=1, lora=True).train.lr > recipe(base, data, epochs=1, lora=False).train.lr
    with pytest.raises(ConfigError, match="epochs = 0"):
        recipe(base, data, epochs=0, lora=False)


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(base: Path, data: ConversationData, tmp_path, capsys):
    settings = ["--set", "train.seq_len=32", "train.batch_size=4", "train.steps=3"]
    out = tmp_path / "new" / "run"
    assert run_cli("finetune", base, "--data", data.path, "--out", out, "--dry-run", *settings) == 0
    printed = capsys.readouterr().out
    assert "3 steps, 384 tokens" in printed
    assert "memory at the peak" in printed
    assert not out.parent.exists()
