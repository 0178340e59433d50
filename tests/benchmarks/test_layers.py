"""Where memory or time is short, benchmarks of layers ask before they start, take less, and keep what they have."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import hf_layer, measure, replica_1b, step
from benchmarks.measure import Report
from moe.profile.step import _memory as memory_of

GIB = 2**30


def with_free(monkeypatch: pytest.MonkeyPatch, script: Any, gib: float) -> None:
    """A card with so much free memory, as far as the script can see."""
    monkeypatch.setattr(script, "lacking", lambda need, device: measure.lacking(need, device, gib * GIB))


# ------------------------------------------------------------------------------------------------------------- step.py


@pytest.mark.parametrize(
    ("gib", "measured"),
    [
        (139, ["one layer of gpt4-8k", "one layer of gpt4-8k", "replica-1b 8"]),
        (79, ["one layer of gpt4-8k", "one layer of gpt4-8k", "replica-1b 8"]),
        (76, ["one layer of gpt4-8k, 4 experts", "one layer of gpt4-8k", "replica-1b 8"]),
        (32, ["one layer of gpt4-8k, 4 experts", "one layer of gpt4-8k, 4 experts", "replica-1b 8"]),
        (22, [None, "one layer of gpt4-8k, 4 experts", "replica-1b 4"]),
    ],
)
def test_a_smaller_card_gets_a_smaller_layer(
    gib: float, measured: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, step, gib)
    monkeypatch.setattr(step, "measure", lambda *_: (None, None))
    report, found = Report(None, {}, str), []
    for ladder in step.cases(dry=False):
        taken = step.first_that_fits(ladder, 1, "cpu", report)
        case = taken[0] if taken else None
        found.append(case and (f"{case.name} {case.batch}" if case.what == "train" else case.name))
    assert found == measured
    assert all("does not fit: needs" in note["problem"] for note in report.record["notes"])


def test_the_whole_layer_needs_what_its_weights_and_gradients_do() -> None:
    backward, decode = step.cases(dry=False)[0][0], step.cases(dry=False)[1][0]
    weights = 2 * 17_420_852_736  # 16 experts of 3 x 10,752 x 28,672, attention, embedding and output layer; bfloat16
    assert 2 * weights + 5 * GIB < step.peak_bytes(backward) < 80e9 + 4 * GIB
    assert weights < step.peak_bytes(decode) < weights + 4 * GIB


def test_one_that_runs_out_of_memory_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, step, 200)

    def measured(case: step.Case, *_: Any) -> tuple[str, str]:
        if "experts" not in case.name:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return "profile", "memory"

    monkeypatch.setattr(step, "measure", measured)
    report = Report(None, {}, str)
    taken = step.first_that_fits(step.cases(dry=False)[0], 1, "cpu", report)
    assert taken is not None
    assert (taken[0].name, *taken[1:]) == ("one layer of gpt4-8k, 4 experts", "profile", "memory")
    assert [note["problem"][:14] for note in report.record["notes"]] == ["out of memory:"]


# --------------------------------------------------------------------------------------------------------- hf_layer.py


def test_a_side_without_memory_is_said_to_be_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from moe.hf.experts import register_experts

    register_experts("reference")
    torch.manual_seed(0)
    layer = hf_layer.Layer(hf_layer.TOY, "cpu", torch.float32)
    plain = layer.step

    def short(name: str, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if name == "grouped_mm":
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return plain(name, *given)

    monkeypatch.setattr(layer, "step", short)
    x, dy = torch.randn(1, 6, 64, requires_grad=True), torch.randn(1, 6, 64)
    report = Report(None, {}, str)
    assert hf_layer.compared(layer, x, dy, report) == ["gpt4_moe", "eager"]
    assert [(note["side"], note["problem"][:14]) for note in report.record["notes"]] == [
        ("grouped_mm", "out of memory:")
    ]


@pytest.mark.parametrize("tokens", [64, 1024])
def test_the_peak_is_what_eager_takes(tokens: int, tmp_path: Path) -> None:
    """As the allocator of a CPU counts it, with the weights and the gradients to compare with."""
    pytest.importorskip("transformers")
    settings = {"hidden_size": 128, "intermediate_size": 448, "num_local_experts": 8, "num_experts_per_tok": 2}
    layer = hf_layer.Layer(settings, "cpu", torch.float32)
    x, dy = torch.randn(1, tokens, 128, requires_grad=True), torch.randn(1, tokens, 128)
    layer.step("eager", x, dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        layer.step("eager", x, dy)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    weights = sum(4 * p.numel() for p in layer.block.parameters())
    taken = 2 * weights + max(memory_of(events, device_type=0).bytes)
    assert taken < hf_layer.peak_bytes(settings, tokens, 4) - measure.FLUSHED < 1.4 * taken


def test_sizes_that_do_not_fit_are_left_out_before_they_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with_free(monkeypatch, hf_layer, 0.0001)
    assert hf_layer.run(quick=True, dry=True, written=tmp_path / "record.json") == []
    notes = json.loads((tmp_path / "record.json").read_text())["notes"]
    assert [note["tokens"] for note in notes] == [24]


# ------------------------------------------------------------------------------------------------------- replica_1b.py


@pytest.mark.parametrize(("gib", "micro_batch"), [(139, 16), (30, 16), (22, 8), (19.5, 4)])
def test_the_micro_batch_is_the_largest_that_fits(
    gib: float, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, replica_1b, gib)
    cfg, peak = replica_1b.configuration(200, False, "cuda")
    assert cfg.train.micro_batch == micro_batch
    assert peak <= gib * GIB


def test_a_run_ends_when_its_time_is_over_and_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe.train.state.save", None)
    written = tmp_path / "record.json"
    record = replica_1b.run(steps=50, seconds=0, dry=True, written=written)
    assert [row["step"] for row in record["rows"]] == [1]
    assert json.loads(written.read_text()) == record
    assert min(record["prepare_s"], record["first_step_s"], record["tokens_per_second"]) > 0
    assert record["first_loss"] == pytest.approx(6.24, abs=0.3)  # that of 512 tokens, guessed evenly
