"""What log points say about the load, against plain arithmetic, and that TensorBoard gets it."""

import math

import pytest
import torch

from moe.train import pictures, train
from moe.train.metrics import Meter, read_metrics, stages


def test_load_statistics_by_hand():
    """Even, one idle expert of four, and one that serves everything."""
    meter = Meter(3, 4, torch.device("cpu"))
    counts = [[5, 5, 5, 5], [10, 6, 4, 0], [0, 20, 0, 0]]
    scalars = {name: torch.tensor(1.0) for name in ("loss", "lm", "balance", "z", "grad_norm")}
    for part in (torch.tensor(counts) // 2, torch.tensor(counts) - torch.tensor(counts) // 2):
        meter.add(scalars, part)
    found = meter.load_statistics()
    entropy = [-sum(c / 20 * math.log(c / 20, 4) for c in row if c) for row in counts]
    cv = [(sum((c - 5) ** 2 for c in row) / 4) ** 0.5 / 5 for row in counts]
    assert list(found["load_entropy_by_layer"].values()) == pytest.approx(entropy)
    assert list(found["load_cv_by_layer"].values()) == pytest.approx(cv)
    assert found["load_max_over_mean_by_layer"] == {"00": 1.0, "01": 2.0, "02": 4.0}
    assert found["dead_experts_by_layer"] == {"00": 0, "01": 1, "02": 3}
    assert (found["load_max_over_mean"], found["dead_experts"]) == (4.0, 4)
    assert (found["load_entropy"], found["load_cv"]) == pytest.approx((0.0, 3**0.5))


def test_tensorboard_has_them_per_layer(cfg, data_dir, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(cfg.with_overrides(["n_layers=2", "train.log_every=4"]), data_dir, tmp_path / "run")
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    for name in ("load_entropy", "load_cv", "load_max_over_mean", "dead_experts"):
        for layer in ("00", "01"):
            scalars = events.Scalars(f"train/{name}_by_layer/{layer}")
            assert [s.step for s in scalars] == [4, 8]
            assert [s.value for s in scalars] == pytest.approx([r[f"{name}_by_layer"][layer] for r in rows])
        assert events.Scalars(f"train/{name}")
    for r in rows:
        for layer, load in enumerate(r["load"]):
            assert r["load_max_over_mean_by_layer"][f"{layer:02d}"] == pytest.approx(max(load) * 4)


def test_stages_lead_back_to_the_first_run(cfg, data_dir, tmp_path):
    """From a checkpoint in the middle of the first, the end of the second, and after all were moved together."""
    place = tmp_path / "here"
    train(cfg, data_dir, place / "first")
    longer = cfg.with_overrides(["max_seq_len=64", "train.seq_len=32", "train.steps=4"])
    train(longer, data_dir, place / "second", start_from=place / "first" / "checkpoints" / "step-000004")
    train(cfg, data_dir, place / "third", start_from=place / "second" / "final")
    place = place.rename(tmp_path / "there")
    found = stages(place / "third")
    assert [records[0]["kind"] for records in found] == ["start"] * 3
    assert [records[0]["seq_len"] for records in found] == [16, 32, 16]
    trained = [[r["step"] for r in records if r["kind"] == "train"] for records in found]
    assert trained == [[1, 2, 3, 4], [1, 2, 3, 4], list(range(1, 9))]
    assert [path.name for path in pictures.draw(place / "third") or []][-1] == "stages.png"
    assert "stages.png" not in [path.name for path in pictures.draw(place / "first") or []]


def test_stages_end_where_a_run_is_gone(cfg, data_dir, tmp_path):
    train(cfg, data_dir, tmp_path / "first")
    (tmp_path / "first" / "final").rename(tmp_path / "kept")
    train(cfg, data_dir, tmp_path / "second", start_from=tmp_path / "kept")
    assert len(stages(tmp_path / "second")) == 1
