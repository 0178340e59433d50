"""Two models on the same text: probabilities and routes, against the models' own logits."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe
from moe.evaluate import Window
from moe.profile import Recorder, Trace
from moe.profile.difference import Reading, compare_readings, log_probability_change
from moe.profile.observe import Pass
from moe.tokenizer import train_bpe
from tests.conftest import run_cli
from tests.hf_models import build

TEXT = "and so it was that the old man went on to the sea, " * 2
TOKENIZER = train_bpe([TEXT], 270)
IDS = torch.tensor([TOKENIZER.encode(TEXT)])


def test_the_divergence_is_kl_where_the_text_is_drawn_from_the_first_model() -> None:
    g = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 6, generator=g, dtype=torch.float64).add(0.1).unbind()
    p, q = p / p.sum(), q / q.sum()
    drawn = torch.multinomial(p, 400_000, replacement=True, generator=g)
    found = log_probability_change(p.log()[drawn], q.log()[drawn])
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum()), rel=0.02)
    assert found.gain == pytest.approx(-found.divergence, rel=0.05)
    assert found.gap == pytest.approx(float((p * (p / q).log().abs()).sum()), rel=0.02)


def numbers(printed: str, first: str) -> list[str]:
    """The cells of the row that begins with `first`."""
    lines = [[c.strip() for c in line.strip("│\n ").split("│")] for line in printed.splitlines()]
    return next(cells for cells in lines if cells[0] == first)


@pytest.mark.parametrize("ours", [True, False])
def test_two_checkpoints(ours: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after a change of one router: what each model says, computed here."""
    if ours:
        cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=300, max_seq_len=512)
        cfg = cfg.with_overrides(["train.dtype=fp32"])
        model: Any = moe.Transformer(cfg)
        routers = [block.moe.router for block in model.blocks]
    else:
        model = build("Olmoe", vocab_size=300, max_position_embeddings=512).eval()
        routers = [layer.mlp.gate for layer in model.model.layers]
    log_p, chosen = [], []
    for name in ("before", "after"):
        if name == "after":
            with torch.no_grad():
                routers[1].weight += 0.3 * torch.randn(
                    routers[1].weight.shape, generator=torch.Generator().manual_seed(0)
                )
        if ours:
            moe.save(model, tmp_path / name, tokenizer=TOKENIZER)
            out = model(IDS[:, :-1])
            logits, ids = out.logits_BSV, [r.ids_TK for r in out.routing]
        else:
            model.save_pretrained(tmp_path / name)
            TOKENIZER.save(tmp_path / name)
            out = model(IDS[:, :-1], output_router_logits=True)
            logits, ids = out.logits, [own.topk(4).indices for own in out.router_logits]
        log_p.append(logits.detach().double().log_softmax(-1).gather(2, IDS[:, 1:, None]).flatten())
        chosen.append([[set(row) for row in layer.tolist()] for layer in ids])
    (tmp_path / "tale.txt").write_text(TEXT)
    text = ["--text", tmp_path / "tale.txt", "--seq-len", 500]
    assert run_cli("profile", "compare", tmp_path / "before", tmp_path / "after", *text) == 0
    printed = capsys.readouterr().out
    change = log_p[1] - log_p[0]
    cells = numbers(printed, "tale")
    assert int(cells[1]) == len(change)
    assert float(cells[2]) == pytest.approx(float(change.abs().mean()), rel=1e-2)
    assert float(cells[3]) == pytest.approx(float(change.mean()), rel=1e-2, abs=1e-5)
    k3 = float((change.exp() - 1 - change).mean())
    assert float(cells[4]) == pytest.approx(k3, rel=1e-2, abs=1e-6)
    for layer in range(2):
        rerouted = sum(a != b for a, b in zip(chosen[0][layer], chosen[1][layer], strict=True)) / len(change)
        assert float(numbers(printed, str(layer))[1].rstrip("%")) == pytest.approx(100 * rerouted, abs=1e-3)
    assert numbers(printed, "0")[1] == "0.000%", "the first layer's router is as it was"
    assert math.isfinite(k3)
    assert numbers(printed, "1")[1] != "0.000%"

    assert run_cli("profile", "compare", tmp_path / "before", tmp_path / "before", *text) == 0
    same = numbers(capsys.readouterr().out, "tale")
    assert [float(c) for c in same[2:]] == [0, 0, 0]


def test_several_sources_are_summed_up(tmp_path: Path) -> None:
    """Over all tokens, not over sources; a single source needs no sum."""
    for name in ("one", "other"):
        with Recorder(tmp_path / name, 4) as recorder:
            ids = torch.tensor([[[0, 1]] * 3])
            recorder.add(Pass(ids, torch.ones(ids.shape), torch.zeros(1), (1, 3), None))
    window = np.arange(3)
    log_p = {"prose": [-1.0, -2.0], "verse": [-3.0]}, {"prose": [-1.5, -2.5], "verse": [-1.0]}
    for sources, want in ((["prose"], None), (["prose", "verse"], (-0.5 - 0.5 + 2.0) / 3)):
        windows = [Window(source, window, window + 1, window >= 0) for source in sources]
        readings = [
            Reading(tmp_path / name, windows, {s: torch.tensor(found[s]) for s in sources}, Trace.open(tmp_path / name))
            for name, found in zip(("one", "other"), log_p, strict=True)
        ]
        changes, _ = compare_readings(*readings)
        assert list(changes) == sources + (["all"] if want is not None else [])
        assert changes["prose"].gain == pytest.approx(-0.5)
        if want is not None:
            assert (changes["all"].tokens, changes["all"].gain) == (3, pytest.approx(want))


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=300, max_seq_len=512)
    for name, changes in (("a", []), ("deep", ["n_layers=3"]), ("short", ["max_seq_len=16"])):
        moe.save(moe.Transformer(cfg.with_overrides(changes)), tmp_path / name, tokenizer=TOKENIZER)
    (tmp_path / "tale.txt").write_text(TEXT)
    text = ["--text", tmp_path / "tale.txt"]
    for other, arguments, message in (
        ("deep", text, "n_layers = 3, but 2 in"),
        ("short", [*text, "--seq-len", 256], "reads the text as other tokens than"),
        ("a", [], "no trace.json there"),
    ):
        assert run_cli("profile", "compare", tmp_path / "a", tmp_path / other, *arguments) == 1
        assert message in " ".join(capsys.readouterr().err.split())
