"""`moe configs`: everything shipped with its size, and every key as in the documentation."""

import re
from pathlib import Path

import pytest

from moe import plan
from moe.config import Config, load_config, shipped
from moe.io.keys import sections
from moe.io.toml import all_keys
from moe.plan.hardware import hardware_names
from moe.plan.models import published
from tests.conftest import run_cli

ROOT = Path(__file__).parents[2]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run_cli("configs", *words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", ["", "60"])
def test_everything_that_is_shipped_is_listed_with_its_size(columns, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = shown(capsys)
    layouts = {path.stem for path in (ROOT / "configs" / "layouts").glob("*.toml")}
    for name in [*shipped(), *published(), *hardware_names(), *layouts]:
        assert re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w.-])", out), name
    assert "1.834T" in out
    assert "278.9B" in out
    assert "…" not in out
    assert plan.params("replica-nano").total == 22_722_240
    assert "22.72M" in out


def test_every_key_has_its_type_default_and_meaning(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = shown(capsys, "--keys")
    keys = {key.name: key for section in sections(Config) for key in section.keys}
    assert list(keys) == [*sorted(keys, key=list(keys).index)]
    assert set(keys) == set(all_keys(Config))
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    for name, key in keys.items():
        row = next(line for line in out.splitlines() if re.match(rf"│ {re.escape(name)} ", line))
        assert key.default in row
        assert " ".join(key.meaning.split()[:3]) in row
        if f"`{name}`" in page:  # what is new is put in by docs/generated.py
            assert key.default in page
    assert keys["train.optimizer"].type == '"adamw" or "muon"'
    assert keys["dense.layers"].default == "has to be given"
    assert keys["train.betas"].type == "list of 2 numbers"
    assert load_config("gpt4-8k").train.lr == float(keys["train.lr"].default)


def test_keys_at_any_width_lose_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    out = shown(capsys, "--keys")
    assert "…" not in out
    assert all(f"{name} " in out or f"{name}\n" in out for name in all_keys(Config))
