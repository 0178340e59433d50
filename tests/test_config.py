"""moe.config: the defaults are the article's shape, reading is strict and helpful, writing loses nothing."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.config import (
    CONFIG_DIR,
    AttentionConfig,
    Config,
    DenseConfig,
    ExpertsConfig,
    RopeConfig,
    RouterConfig,
    TrainConfig,
    load_config,
    shipped,
)
from moe.errors import ConfigError
from moe.io.toml import from_table
from moe.layers import rope_frequencies

REPLICAS = sorted(path.stem for path in CONFIG_DIR.glob("replica-*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- the article


def test_defaults_are_the_shape_of_the_article() -> None:
    cfg = Config()
    assert (cfg.d_model, cfg.n_layers, cfg.vocab_size, cfg.max_seq_len) == (10_752, 120, 100_352, 8192)
    assert (cfg.attention.n_heads, cfg.attention.n_kv_heads, cfg.attention.head_dim) == (168, 1, 128)
    assert (cfg.experts.n_experts, cfg.experts.top_k, cfg.experts.d_ff) == (16, 2, 28_672)
    assert cfg.experts.activation == "swiglu"
    assert not cfg.tie_embeddings
    assert cfg.attention.rope.scaling == "none"
    assert load_config("gpt4-8k") == cfg


def test_32k_differs_from_8k_in_its_context_only() -> None:
    cfg = load_config("gpt4-32k")
    assert cfg.max_seq_len == 32_768
    rope = cfg.attention.rope
    assert rope.scaling == "yarn"
    assert rope.factor * rope.original_max_seq_len == cfg.max_seq_len
    attention = dataclasses.replace(cfg.attention, rope=RopeConfig())
    assert dataclasses.replace(cfg, name="gpt4-8k", max_seq_len=8192, attention=attention) == Config()


def test_gelu_shape_has_the_same_expert_size() -> None:
    gelu, swiglu = load_config("gpt4-8k-gelu").experts, Config().experts
    assert gelu.activation == "gelu"
    assert 2 * gelu.d_ff == 3 * swiglu.d_ff


# ---------------------------------------------------------------------------------------------------------- replicas


def architecture(cfg: Config) -> dict[str, Any]:
    """What makes the model; not its name, its recipe, its vocabulary or its context."""
    skip = {"name", "train", "router", "vocab_size", "max_seq_len"}
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in skip}


@pytest.mark.parametrize("name", REPLICAS)
def test_shipped_replicas_keep_the_ratios_of_the_full_shape(name: str) -> None:
    full, cfg = load_config("gpt4-8k"), load_config(name)
    assert cfg.name == name
    assert architecture(cfg) == architecture(full.scaled(d_model=cfg.d_model, n_layers=cfg.n_layers))
    assert_ratios(cfg)


def assert_ratios(cfg: Config) -> None:
    full = Config()
    assert 3 * cfg.experts.d_ff == 8 * cfg.d_model
    assert cfg.experts.d_ff * full.d_model == full.experts.d_ff * cfg.d_model
    assert cfg.attention.n_heads * cfg.attention.head_dim == 2 * cfg.d_model
    assert cfg.attention.n_kv_heads == 1
    assert (cfg.experts.n_experts, cfg.experts.top_k) == (16, 2)
    assert cfg.attention.head_dim == (64 if cfg.d_model < 1536 else 128)


WIDTHS = st.integers(1, 15).map(lambda n: 96 * n) | st.integers(8, 64).map(lambda n: 192 * n)


@given(d_model=WIDTHS, n_layers=st.integers(1, 200))
def test_scaled_keeps_the_ratios_at_every_width(d_model: int, n_layers: int) -> None:
    cfg = Config().scaled(d_model=d_model, n_layers=n_layers)
    assert (cfg.d_model, cfg.n_layers) == (d_model, n_layers)
    assert_ratios(cfg)


def test_scaled_to_the_full_width_is_the_full_shape() -> None:
    assert Config().scaled(d_model=10_752, n_layers=120, name="gpt4-8k") == Config()


def test_scaled_gelu_has_four_times_the_width() -> None:
    cfg = load_config("gpt4-8k-gelu").scaled(d_model=384, n_layers=3)
    assert cfg.experts.d_ff == 4 * 384


@pytest.mark.parametrize(
    ("d_model", "multiple", "nearest"),
    [
        (64, 96, 96),
        (100, 96, 96),
        (300, 96, 288),
        (1530, 96, 1536),
        (0, 96, 96),
        (-192, 96, 96),
        (1632, 192, 1536),  # at heads of 128 its query width of 3264 would be 25.5 of them
        (10_000, 192, 9984),
    ],
)
def test_scaled_refuses_widths_without_whole_ratios(d_model: int, multiple: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=rf"d_model = {d_model}: .*multiple of {multiple} .*nearest is {nearest}"):
        Config().scaled(d_model=d_model, n_layers=2)


# ------------------------------------------------------------------------------------------------------------ errors

BAD_FILES = {
    # file -> what the message must say: the field, the value, the remedy
    "d_modle = 192": ["'d_modle'", "did you mean 'd_model'"],
    "[experts]\nn_expert = 3": ["'experts.n_expert'", "did you mean 'experts.n_experts'"],
    "top_k = 2": ["'top_k'", "did you mean 'experts.top_k'"],
    "[attention.rope]\nbase = 1.0": ["'attention.rope.base'"],
    "d_model = 192.0": ["d_model = 192.0", "whole number", "without a point"],
    "d_model = true": ["d_model = True", "whole number", "not true or false"],
    "norm_eps = true": ["norm_eps = True", "a number", "not true or false"],
    "d_model = '192'": ["d_model = '192'", "whole number", "not a string"],
    "name = 3": ["name = 3", "a string", "not a whole number"],
    "tie_embeddings = 1": ["tie_embeddings = 1", "true or false", "not a whole number"],
    "[train]\nactivation_checkpointing = 'some'": ["'some'", "must be one of 'none', 'selective', 'full'"],
    "[train]\nactivation_checkpointing = 1": ["activation_checkpointing = 1", "'none', 'selective', 'full'"],
    "d_model = 2024-01-01": ["d_model = ", "whole number"],
    "d_model = [192]": ["d_model = [192]", "whole number", "not a list"],
    "[d_model]\nx = 1": ["d_model = ", "whole number", "not a section"],
    "experts = 16": ["experts = 16", "[experts]"],
    "attention = {rope = 2}": ["attention.rope = 2", "[attention.rope]"],
    "[[experts]]\ntop_k = 1": ["experts = ", "[experts]"],
    "d_model = 0": ["d_model = 0", "greater than 0"],
    "n_layers = -1": ["n_layers = -1", "greater than 0"],
    "norm_eps = nan": ["norm_eps = nan", "greater than 0"],
    "[attention]\nhead_dim = 63": ["attention.head_dim = 63", "even", "nearest is 64"],
    "[attention]\nn_heads = 12\nn_kv_heads = 5": ["attention.n_kv_heads = 5", "n_heads = 12", "nearest that does is 4"],
    "[attention.rope]\nscaling = 'ntk'": ["attention.rope.scaling = 'ntk'", "'none', 'linear', 'yarn'"],
    "[attention.rope]\nscaling = [1]": ["attention.rope.scaling = [1]", "'none', 'linear', 'yarn'"],
    "[attention.rope]\nfactor = 4.0": ["attention.rope.factor = 4.0", "no effect", '"linear" or "yarn"'],
    "[attention.rope]\ntheta = 0": ["attention.rope.theta = 0.0", "greater than 0"],
    "[experts]\nn_experts = 4\ntop_k = 5": ["experts.top_k = 5", "experts.n_experts = 4"],
    "[experts]\ntop_k = 0": ["experts.top_k = 0", "greater than 0"],
    "[experts]\nactivation = 'relu'": ["experts.activation = 'relu'", "'swiglu', 'gelu'"],
    "[router]\nz_loss = -0.1": ["router.z_loss = -0.1", "0 or more"],
    "[train]\nlr = 0": ["train.lr = 0.0", "greater than 0"],
    "[train]\nbetas = [0.9]": ["train.betas = [0.9]", "list of 2"],
    "[train]\nbetas = [0.9, 1.0]": ["train.betas = (0.9, 1.0)", "[0, 1)"],
    "[train]\nbetas = [0.9, '1']": ["train.betas[1] = '1'", "a number"],
    "[train]\nbetas = 0.9": ["train.betas = 0.9", "list of 2"],
    "[train]\ndecay = 1.5": ["train.decay = 1.5", "0 to 1"],
    "[train]\nwarmup = -1": ["train.warmup = -1", "0 or more"],
    "[train]\nbatch_size = 6\nmicro_batch = 4": ["train.micro_batch = 4", "train.batch_size = 6"],
    "max_seq_len = 64\n[train]\nseq_len = 65": ["train.seq_len = 65", "max_seq_len = 64"],
    "d_model = ": ["not a TOML file"],
    "d_model = " + "9" * 5000: ["not a TOML file"],
    "d_model = " + "[" * 5000: ["not a TOML file"],
    "d_model = 0x" + "f" * 5000: ["d_model = a whole number of 6,021 digits", "below 2^63"],
    "norm_eps = 0x" + "f" * 5000: ["norm_eps = a whole number of 6,021 digits", "below 2^63"],
    "d_model = 2_147_483_648": ["d_model = 2147483648", "below 2^31"],
    "n_layers = 1_048_576": ["n_layers = 1048576", "at most 100,000"],
    "d_model = 2_000_000_000\nvocab_size = 2_000_000_000": ["vocab_size = 2000000000", "makes a weight of 2^61"],
    "[experts]\nn_experts = 1_000_000\nd_ff = 2_000_000_000": ["experts.d_ff = 2000000000", "more than can be"],
    "[train]\ntokens = '1" + "0" * 400 + "'": ["train.tokens = '1000", "(403 characters)", "number of tokens"],
    "[train]\ngrad_clip = 0": ["train.grad_clip = 0.0", "greater than 0"],
    "[attention.rope]\nscaling = 'yarn'\nfactor = 4\ntheta = 1": [
        "attention.rope.theta = 1.0",
        "greater than 1",
        "yarn",
    ],
    "[attention.rope]\nscaling = 'yarn'\nbeta_fast = 0.5": ["attention.rope.beta_fast = 0.5", "beta_slow = 1.0"],
    "[attention.rope]\ntheta = 1e300": ["attention.rope.theta = 1e+300", "must be below 1e+30"],
    "[attention.rope]\nscaling = 'yarn'\nbeta_fast = 1e308": [
        "attention.rope.beta_fast = 1e+308",
        "must be below 1e+30",
    ],
}


NUMBERS = [
    ("attention.rope", "theta factor original_max_seq_len beta_fast beta_slow", False),
    ("attention", "n_heads n_kv_heads head_dim", False),
    ("experts", "n_experts top_k d_ff", False),
    ("router", "balance_loss z_loss bias_update_rate", True),
    ("train", "lr muon_lr embedding_lr muon_momentum weight_decay min_lr decay steps batch_size log_every", None),
    ("", "d_model n_layers vocab_size max_seq_len norm_eps", False),
]


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "0", "-0.0", "1e400"])
def test_no_number_is_accepted_that_cannot_be(value: str, scaling: str) -> None:
    """Each setting by name, as a file or --set gives it; 0 is one where it turns something off."""
    for section, names, zero_is_off in NUMBERS:
        for name in names.split():
            key = f"{section}.{name}".lstrip(".")
            changes = [f"attention.rope.scaling={scaling}", f"{key}={value}"]
            if zero_is_off is not False and float(value) == 0.0:
                continue
            with pytest.raises(ConfigError, match=rf"^{key} = ") as caught:
                Config().with_overrides(changes)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scaling", ["none", "linear", "yarn"])
@pytest.mark.parametrize("name", ["theta", "factor", "beta_fast", "beta_slow"])
@pytest.mark.parametrize("value", [1e-30, 1.5, 1e30])
def test_every_rope_that_is_accepted_has_finite_frequencies(scaling: Any, name: str, value: float) -> None:
    try:
        rope = RopeConfig(**{"scaling": scaling, name: value})
    except ConfigError:
        return
    frequencies, temperature = rope_frequencies(64, rope)
    assert all(math.isfinite(f) for f in [*frequencies, temperature])


def test_equal_configurations_are_one_key() -> None:
    """Of a dictionary, a set or a cache; all sections, the one with a table in it included."""
    made = [load_config(name) for name in shipped()] + [Config(dense=DenseConfig(1, 8))]
    made.append(Config(train=TrainConfig(epochs={"text": 2})))
    again = [from_table(Config, tomllib.loads(cfg.to_toml())) for cfg in made]
    assert made == again
    assert [hash(cfg) for cfg in made] == [hash(cfg) for cfg in again]
    assert len({*made, *again}) == len(set(made))
    for cfg in made:
        for field in dataclasses.fields(cfg):
            hash(getattr(cfg, field.name))
    assert made[-1] != Config()  # what is not hashed is still compared
    assert {made[-1]: 1, Config(): 2}[Config()] == 2


@pytest.mark.parametrize("text", BAD_FILES)
def test_error_names_field_value_and_remedy(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    for part in BAD_FILES[text]:
        assert part in message


def test_not_text_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r"'gpt4-8'; did you mean 'gpt4-8k'\?.*gpt4-32k"):
        load_config("gpt4-8")


def test_the_same_rules_hold_without_a_file() -> None:
    with pytest.raises(ConfigError, match=r"experts\.top_k = 9"):
        ExpertsConfig(n_experts=8, top_k=9)
    with pytest.raises(ConfigError, match=r"attention\.head_dim = 7"):
        AttentionConfig(head_dim=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().d_model = 1  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------------- reading


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    path = write(tmp_path, "d_model = 64\nnorm_eps = 1\n[train]\nbetas = [0, 0.5]")
    cfg = load_config(path)
    train = dataclasses.replace(TrainConfig(), betas=(0.0, 0.5))
    assert cfg == dataclasses.replace(Config(), name="model", d_model=64, norm_eps=1.0, train=train)
    assert isinstance(cfg.norm_eps, float)
    assert all(isinstance(beta, float) for beta in cfg.train.betas)
    assert load_config(str(path)) == cfg


def test_every_shipped_name_loads_under_its_own_name() -> None:
    assert "gpt4-8k" in shipped()
    for name in shipped():
        assert load_config(name).name == name


# ----------------------------------------------------------------------------------------------------------- writing

positive = st.integers(1, 10**6)
fraction = st.floats(0, 1, exclude_max=True)
positive_float = st.floats(1e-300, 1e29, exclude_min=True)
texts = st.text(st.characters(codec="utf-8")) | st.text("\"\\'#=[]\n\r\t\x00\x1f\x7f\x85\u2028é🙂")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    n_kv_heads, n_experts = draw(st.integers(1, 8)), draw(st.integers(1, 64))
    scaling: Any = draw(st.sampled_from(["none", "linear", "yarn"]))
    rope = RopeConfig(
        theta=draw(st.floats(1, 1e30, exclude_min=True)),
        scaling=scaling,
        factor=1.0 if scaling == "none" else draw(st.floats(1e-30, 1e30)),
    )
    heads = n_kv_heads * draw(st.integers(1, 8))
    return Config(
        name=draw(texts),
        d_model=draw(positive),
        tie_embeddings=draw(st.booleans()),
        norm_eps=draw(positive_float),
        attention=AttentionConfig(heads, n_kv_heads, 2 * draw(st.integers(1, 128)), rope),
        router=RouterConfig(draw(st.floats(0, 1e6)), draw(st.floats(0, 1e6)), draw(st.floats(0, 1))),
        experts=ExpertsConfig(n_experts, draw(st.integers(1, n_experts)), draw(positive)),
        train=TrainConfig(betas=(draw(fraction), draw(fraction)), lr=draw(positive_float), compile=draw(st.booleans())),
    )


@given(cfg=configs())
def test_toml_round_trip(tmp_path_factory: pytest.TempPathFactory, cfg: Config) -> None:
    path = tmp_path_factory.mktemp("round") / "other-name.toml"
    path.write_bytes(cfg.to_toml().encode())
    assert load_config(path) == cfg


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_change_only_what_they_name() -> None:
    cfg = load_config("gpt4-32k")
    changed = cfg.with_overrides(
        ["train.lr=3e-4", " train.schedule = wsd ", "attention.rope.factor=8", 'name="a=b"', "train.betas=[0.8, 0.9]"]
    )
    rope = dataclasses.replace(cfg.attention.rope, factor=8.0)
    assert changed == dataclasses.replace(
        cfg,
        name="a=b",
        attention=dataclasses.replace(cfg.attention, rope=rope),
        train=dataclasses.replace(cfg.train, lr=3e-4, schedule="wsd", betas=(0.8, 0.9)),
    )
    assert math.isclose(changed.train.lr, 3e-4)
    assert cfg == load_config("gpt4-32k")


def test_the_last_of_two_overrides_counts() -> None:
    assert Config().with_overrides(["d_model=1", "d_model=2"]).d_model == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lr", "'train.lr': must be key=value"),
        ("=3", "'=3': must be key=value"),
        ("train.lr=", "train.lr = '': must be a number"),
        ("train.lr=fast", "train.lr = 'fast': must be a number"),
        ("train.rl=1", "unknown key 'train.rl'; did you mean 'train.lr'?"),
        ("trian.steps=1", "unknown key 'trian.steps'; did you mean 'train.steps'?"),
        ("attention.roep.theta=1", "unknown key 'attention.roep.theta'; did you mean 'attention.rope.theta'?"),
        ("expert={n_experts=2, top_k=1}", "unknown key 'expert'; did you mean 'experts'?"),
        ("train.steps=1e30", "train.steps = 1e+30: must be a whole number, written without a point or an exponent"),
        ("train=1", r"train = 1: is a section"),
        ("d_model.x=1", "d_model = {'x': 1}: must be a whole number"),
        ("experts.top_k=17", "experts.top_k = 17: must not be greater than experts.n_experts = 16"),
    ],
)
def test_bad_overrides(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config().with_overrides([assignment])
    assert message in str(caught.value)


def test_an_override_cannot_be_both_section_and_setting() -> None:
    with pytest.raises(ConfigError, match="train is a setting, not a section"):
        Config().with_overrides(["train=1", "train.lr=1"])
