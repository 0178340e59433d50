"""Numbers that cannot be: not numbers, infinite, negative, far beyond anything, for every argument and every flag."""

import contextlib
import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from moe import plan
from moe.cli import main, usage
from moe.config import load_config
from moe.errors import ConfigError
from moe.io.toml import parse_value
from moe.plan.calibrate import read_steps
from moe.plan.hf_shapes import shape_from_hf
from moe.plan.layout import Layout
from moe.plan.memory import stage_counts
from moe.plan.quantities import given
from moe.plan.sweeps import kv_room
from moe.plan.train import mfu
from tests.conftest import run_cli, tiny_config

A80 = plan.load_hardware("a100-80")
SERVE, TRAIN = plan.load_layout("gpt4-serve"), plan.load_layout("gpt4-train")
TOKENS, USD = plan.quantity("1 Ttoken"), plan.quantity("0.004 USD/ktoken")
NEVER = [-1, math.nan, math.inf, -math.inf, 10**5000, -(10**5000), 1e308, "8", None]
CALLS: dict[str, Any] = {
    "decode batch": lambda x: plan.decode("gpt4-8k", SERVE, A80, batch=x, context=0),
    "decode context": lambda x: plan.decode("gpt4-8k", SERVE, A80, batch=1, context=x),
    "prefill batch": lambda x: plan.prefill("gpt4-8k", SERVE, A80, batch=x, prompt=8),
    "prefill prompt": lambda x: plan.prefill("gpt4-8k", SERVE, A80, batch=1, prompt=x),
    "serving_price utilisation": lambda x: plan.serving_price(output=USD, prompt=USD, utilisation=x),
    "serving_price reclaimed": lambda x: plan.serving_price(output=USD, prompt=USD, utilisation=1, reclaimed=x),
    "speculate batch": lambda x: plan.speculate("gpt4-8k", SERVE, A80, batch=x, acceptance=0.5),
    "speculate acceptance": lambda x: plan.speculate("gpt4-8k", SERVE, A80, batch=1, acceptance=x),
    "speculate drafts": lambda x: plan.speculate("gpt4-8k", SERVE, A80, batch=1, acceptance=0.5, drafts=x),
    "speculate draft_cost": lambda x: plan.speculate("gpt4-8k", SERVE, A80, batch=1, acceptance=0.5, draft_cost=x),
    "experts_sheet n_experts": lambda x: plan.experts_sheet(x, 1, 8),
    "experts_sheet top_k": lambda x: plan.experts_sheet(16, x, 8),
    "experts_sheet tokens": lambda x: plan.experts_sheet(16, 2, x),
    "serving_memory context": lambda x: plan.serving_memory("gpt4-8k", SERVE, A80, x),
    "frontier chips": lambda x: plan.frontier("gpt4-8k", A80, chips=(x,)),
    "frontier batches": lambda x: plan.frontier("gpt4-8k", A80, batches=(x,)),
    "frontier context": lambda x: plan.frontier("gpt4-8k", A80, context=x),
    "kv_room kv_heads": lambda x: kv_room("gpt4-8k", SERVE, ["a100-80"], kv_heads=(x,)),
    "fit layers": lambda x: plan.fit(layers=x),
    "fit n_experts": lambda x: plan.fit(n_experts=x),
    "fit n_kv_heads": lambda x: plan.fit(n_kv_heads=x),
    "fit vocab_size": lambda x: plan.fit(vocab_size=x),
    "fit target total": lambda x: plan.fit({"total": x}),
    "redesign gpus": lambda x: plan.redesign("gpt4-8k", A80, gpus=x, per_user=1),
    "redesign per_user": lambda x: plan.redesign("gpt4-8k", A80, gpus=8, per_user=x),
    "redesign context": lambda x: plan.redesign("gpt4-8k", A80, gpus=8, per_user=1, context=x),
    "train_cost mfu": lambda x: plan.train_cost("gpt4-8k", A80, tokens=TOKENS, gpus=8, mfu=x),
    "train_cost duty": lambda x: plan.train_cost("gpt4-8k", A80, tokens=TOKENS, gpus=8, mfu=0.3, duty=x),
    "train_cost gpus": lambda x: plan.train_cost("gpt4-8k", A80, tokens=TOKENS, gpus=x, mfu=0.3),
    "predict_run duty": lambda x: plan.predict_run("gpt4-8k", TRAIN, A80, TOKENS, duty=x),
    "Efficiency gemm": lambda x: plan.Efficiency(gemm=x),
    "Efficiency memory": lambda x: plan.Efficiency(memory=x),
    "Efficiency expert_imbalance": lambda x: plan.Efficiency(expert_imbalance=x),
    "params_sheet context": lambda x: plan.params_sheet("gpt4-8k", x),
    "flops_per_token context": lambda x: plan.flops_per_token("gpt4-8k", x),
    "attention_flops context": lambda x: plan.attention_flops("gpt4-8k", x),
    "device_memory micro_batch": lambda x: plan.device_memory("replica-nano", micro_batch=x),
    "device_memory seq_len": lambda x: plan.device_memory("replica-nano", seq_len=x),
    "device_step_time efficiency": lambda x: plan.device_step_time("replica-nano", A80, x),
    **{f"Layout {name}": lambda x, name=name: Layout(**{name: x}) for name in ("tp", "pp", "dp", "seq_len", "ep")},
    "Layout batch_tokens": lambda x: Layout(batch_tokens=x),
}
OPTIONAL = {"device_memory micro_batch", "device_memory seq_len", "frontier batches", "kv_room kv_heads"}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_cannot_be_is_named_with_its_value(call: str) -> None:
    for value in NEVER:
        if value is None and call in OPTIONAL:
            continue
        with pytest.raises(ConfigError) as error:
            CALLS[call](value)
        message = str(error.value)
        assert message.startswith(f"{call.partition(' ')[2]} = "), message
        assert len(message) < 300


@pytest.mark.parametrize("text", ["0 GB/s", "-1 GB/s", "nan GB/s", "inf GB/s", "1e999 GB/s", "1e308 TB/s", "9" * 5000])
def test_an_amount_that_cannot_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^bus = "):
        given(text, "GB/s", "bus")
    with pytest.raises(ConfigError, match=r"^bus = "):
        plan.Efficiency(bus=text)


def test_quantities_that_cannot_be() -> None:
    none = plan.quantity(0, "token")
    for call in (
        lambda: plan.predict_run("gpt4-8k", TRAIN, A80, none),
        lambda: plan.train_cost("gpt4-8k", A80, tokens=none, gpus=8, mfu=0.3),
        lambda: mfu("gpt4-8k", A80, tokens=none, gpu_time=plan.quantity("1 h")),
        lambda: plan.predict_small_run(load_config("replica-1b-web"), plan.load_layout("node-8"), A80, tokens=none),
    ):
        with pytest.raises(ConfigError, match=r"^tokens = "):
            call()
    with pytest.raises(ConfigError, match=r"^lifetime_tokens = "):
        plan.serving_price(output=USD, prompt=USD, utilisation=1, lifetime_tokens=none)


def test_files_with_numbers_that_cannot_be(tmp_path: Path) -> None:
    long = "9" * 5000
    for name, text in (
        ("model.toml", f"n_layers = {long}"),
        ("model.toml", "n_layers = 1000000000000"),
        ("model.toml", "norm_eps = inf"),
        ("model.toml", f"norm_eps = 1{'0' * 400}"),
        ("model.toml", "x = " + "[" * 20_000),
        ("model.toml", f'[train]\ntokens = "{long}"'),
        ("config.json", '{"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1e300}'),
        ("config.json", f'{{"model_type": "llama", "hidden_size": {long}}}'),
        ("config.json", "[" * 200_000),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError) as error:
            plan.load_shape(tmp_path / name)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400
    assert parse_value("[" * 20_000) == "[" * 20_000
    (tmp_path / "steps.csv").write_text("flop,seconds\n1e308,1e-308\n1e308,1\n")
    with pytest.raises(ConfigError, match="flop = '1e308'"):
        read_steps(tmp_path / "steps.csv")
    with pytest.raises(ConfigError, match="num_hidden_layers = inf"):
        shape_from_hf({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": math.inf})


PLAN = [path for path in usage.commands(main.app) if path[0] == "plan"]
MODES = {"train": [[], ["--mfu", "0.3"]], "memory": [["--serve"], ["--cards"]], "decode": [["--utilisation", "0.5"]]}
FILES = {"calibrate": ["steps.csv"], "report": ["report.md"]}
AMOUNTS = {"--tokens": " token", "--lifetime": " token", "--bus": " GB/s", "--peak": " TFLOP/s"}


@pytest.mark.parametrize("path", PLAN, ids=" ".join)
def test_every_numeric_flag_of_every_command(path: tuple[str, ...], tmp_path: Path, monkeypatch: Any) -> None:
    """Either one line that names the flag, with status 2, or figures that are finite."""
    monkeypatch.chdir(tmp_path)
    Path("steps.csv").write_text("flop,bytes,seconds\n1e12,1e9,1\n2e12,1e9,2\n3e12,4e9,4\n")
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main.main([*path, "--help"])
    numeric = re.findall(r"(--[a-z-]+) (?:N|NUMBER)\b", page.getvalue())
    for flag in [*dict.fromkeys(numeric), *(a for a in AMOUNTS if f"{a} " in page.getvalue())]:
        for mode in MODES.get(path[-1], [[]]):
            if flag in mode:
                continue
            for value in ("0", "-1", "nan", "inf", "1e308", "1e-320", "9" * 18, "9" * 5000):
                words = [*path, *FILES.get(path[-1], []), *mode, flag, value + AMOUNTS.get(flag, ""), "--json"]
                out, err = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    status = run_cli(*words)
                if status == 0:
                    assert "Infinity" not in out.getvalue(), words
                    assert '"inf"' not in out.getvalue(), words
                    json.loads(out.getvalue())
                    continue
                assert status == 2, words
                assert err.getvalue().count("\n") == 1, words
                blamed = (f"error: {flag}", "error: --prompt")  # prices are of a prompt as long as the context
                assert err.getvalue().startswith(blamed), (words, err.getvalue())
                assert len(err.getvalue()) < 300


def test_each_of_more_gpus_than_key_value_heads_holds_one_head() -> None:
    """By hand: of 2 heads on 4 GPUs, each GPU has one key and one value projection, a quarter of the rest."""
    shape = plan.load_shape(tiny_config(n_kv_heads=2))
    (found,) = stage_counts(shape, Layout(tp=4))
    (whole,) = stage_counts(shape, Layout())
    d, a, layers = shape.d_model, shape.main.attention, shape.n_layers
    heads = 2 * d * a.head_dim * layers  # one key and one value head of every layer
    rest = whole.sharded - 2 * heads
    replicated = whole.replicated
    assert found.per_gpu(Layout(tp=4)) == pytest.approx(rest / 4 + heads + replicated + whole.routed / 4, abs=layers)


def test_what_is_long_is_printed_on_a_screen() -> None:
    made = [
        plan.training_memory("gpt4-8k", TRAIN, A80), plan.params_sheet("gpt4-8k"), TRAIN, A80, load_config("gpt4-8k"),
        plan.predict_run("gpt4-8k", TRAIN, A80, TOKENS)["train.cost"], plan.load_shape("gpt4-8k"),
        plan.load_shape("deepseek-v3"), plan.fit()[0], plan.params("gpt4-8k"), plan.Efficiency(),
    ]  # fmt: skip
    for one in made:
        lines = repr(one).splitlines()
        assert sum(-(-len(line) // 100) for line in lines) <= 24, type(one)
    assert "stage0.params" in repr(made[0])
    assert "memory.headroom" in repr(made[0])
    assert "104 more" in repr(made[0])
    assert max(map(len, repr(made[0]).splitlines())) <= 100
    assert sys.getsizeof(repr(made[6])) < 2000


def test_what_is_frozen_can_be_a_key() -> None:
    """Of equal ones the hash is the same, too, with the tables in them."""
    for make in (
        lambda: load_config("recipe-1k").with_overrides(["train.epochs={text = 2}"]), lambda: plan.params("gpt4-8k"),
        lambda: plan.load_layout("gpt4-train"), lambda: plan.load_shape("gpt4-8k"), lambda: plan.Efficiency(),
        lambda: plan.fit()[0],
    ):  # fmt: skip
        assert make() == make()
        assert hash(make()) == hash(make())
    assert hash(A80) == hash(A80)
