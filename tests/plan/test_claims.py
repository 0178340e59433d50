"""The claims' verdicts are computed: they change where the shape or a unit does, and nowhere else."""

from collections import Counter
from dataclasses import replace

import pytest

from moe.config import Config
from moe.errors import ConfigError
from moe.plan.claims import CLAIMS_FILE, Claim, check_claims, environment, load_claims
from moe.plan.flops import flops_per_token
from moe.plan.hardware import load_hardware
from moe.plan.layout import load_layout
from moe.plan.serving import decode

CLAIMS = load_claims()


def verdicts(model: object = "gpt4-8k", claims: list[Claim] | None = None) -> dict[str, str]:
    return {v.claim.id: v.verdict for v in check_claims(claims or CLAIMS, model)}  # type: ignore[arg-type]


BASE = verdicts()


def test_every_verdict_is_the_expected_one() -> None:
    assert {c.id for c in CLAIMS} == {f"C{i:02d}" for i in range(1, 103)}
    assert {c.id: c.verdict for c in CLAIMS} == BASE
    counts = Counter(BASE.values())
    assert counts["EXTERNAL"] == 28
    assert sum(counts.values()) - counts["EXTERNAL"] == 74


def changed(cfg: Config) -> dict[str, str]:
    """The claims whose verdict another shape changes."""
    found = verdicts(cfg)
    return {name: verdict for name, verdict in found.items() if verdict != BASE[name]}


def test_a_narrower_expert_flips_totals_and_flops() -> None:
    cfg = Config()
    found = changed(replace(cfg, experts=replace(cfg.experts, d_ff=cfg.experts.d_ff // 2)))
    for name in ("C21", "C25", "C28", "C29", "C30", "C31", "C48", "C90"):
        assert found[name] == "CONFLICT", name
    assert "C27" not in found, "attention stays"
    assert "C24" not in found, "and so does the number of experts"


def test_top_1_flips_what_a_token_uses_but_not_the_total() -> None:
    cfg = Config()
    found = changed(replace(cfg, experts=replace(cfg.experts, top_k=1)))
    assert {"C26", "C28", "C29", "C45", "C78", "C81"} <= found.keys()
    assert not {"C21", "C25", "C27", "C31"} & found.keys()


def test_query_width_tied_to_the_model_width_flips_attention_alone() -> None:
    cfg = Config()
    found = changed(replace(cfg, attention=replace(cfg.attention, n_heads=88)))
    assert found["C27"] == "CONFLICT"
    assert not {"C21", "C25", "C94"} & found.keys()


def test_eight_key_value_heads_flip_multi_query() -> None:
    cfg = Config()
    found = changed(replace(cfg, attention=replace(cfg.attention, n_kv_heads=8)))
    assert found["C94"] == "CONFLICT"


def test_another_depth_breaks_what_hangs_on_it() -> None:
    """The article's layout has stages for 120 layers: what it says of memory cannot be of 96, nor the totals."""
    found = changed(replace(Config(), n_layers=96))
    assert {name: found[name] for name in ("C21", "C25", "C92", "C96")} == dict.fromkeys(
        ("C21", "C25", "C92", "C96"), "CONFLICT"
    )
    dense = verdicts(model="llama-2-70b")
    assert dense["C78"] == "CONFLICT"  # the load of an expert, where there is none


def with_unit(name: str, unit: str, **changes: float) -> str:
    claims = [replace(c, unit=unit, **changes) if c.id == name else c for c in CLAIMS]
    return verdicts(claims=claims)[name]


def test_units_decide() -> None:
    assert with_unit("C29", "GFLOP/token") == "REPRODUCED"
    assert with_unit("C31", "GFLOP/token") == "REPRODUCED"
    assert with_unit("C72", "FLOP/B") == "REPRODUCED"
    assert with_unit("C91", "USD/ktoken") == "UNDERDETERMINED"  # possible, and a matter of the batch
    assert with_unit("C48", "MB") == "UNIT-ERROR"
    assert with_unit("C21", "Mparam") == "UNIT-ERROR"
    assert with_unit("C52", "h") == "CONFLICT"
    assert with_unit("C27", "GB") == "UNIT-ERROR"  # the right number, of parameters and not of bytes


def test_bounds_decide() -> None:
    moved = [replace(c, lo=100.0, hi=120.0) if c.id == "C52" else c for c in CLAIMS]
    assert verdicts(claims=moved)["C52"] == "CONFLICT"
    moved = [replace(c, hi=31.0) if c.id == "C85" else c for c in CLAIMS]
    assert verdicts(claims=moved)["C85"] == "REPRODUCED"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "external"', 'kind = "extern"', "kind = 'extern'"),
        ('verdict = "EXTERNAL"', 'verdict = "MAYBE"', "verdict = 'MAYBE'"),
        ("section", "sektion", "unknown key 'sektion'; did you mean 'section'"),
        ('kind = "external"', 'kind = "derived"', "needs an expression"),
    ],
)
def test_bad_files(tmp_path, old: str, new: str, message: str) -> None:
    row = CLAIMS_FILE.read_text().split("[[claim]]")[2]
    assert "C02" in row
    place = tmp_path / "claims.toml"
    place.write_text("[[claim]]" + row.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_claims(place)


@pytest.mark.parametrize("expr", ["nothing", "1 / 0", "article('C02') + model", "hardware('h10')", "2 * byte + 3 * s"])
def test_expressions_that_fail_name_their_claim(expr: str) -> None:
    claims = [replace(c, expr=expr) if c.id == "C21" else c for c in CLAIMS]
    with pytest.raises(ConfigError, match="claim C21: "):
        check_claims(claims)


def test_a_price_lies_between_a_batch_of_one_and_the_whole_peak() -> None:
    found = environment(CLAIMS, "gpt4-8k")["price_range"]("a100-40", "bf16")
    a100, serve = load_hardware("a100-40"), load_layout("gpt4-serve")
    one = decode("gpt4-8k", serve, a100, batch=1, context=8192, collectives=False)["decode.cost"]
    peak = 128 * 1 / 3600 / (128 * 312e12 / flops_per_token("gpt4-8k"))
    assert found.hi == pytest.approx(one.value)
    assert found.lo == pytest.approx(peak)
    assert found.lo < found.value < found.hi
    assert found.unknowns == {"batch per pass"}


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.5, "REPRODUCED"), (0.7, "CONFLICT"), (500, "UNIT-ERROR"), (50, "UNIT-ERROR"), (0.005, "UNIT-ERROR")],
)
def test_a_slip_of_a_unit_below_one(value: float, verdict: str) -> None:
    claim = replace(CLAIMS[20], id="C", kind="derived", value=0.5, unit="GB", lo=0.4, hi=0.6, why="")
    assert verdicts(claims=[replace(claim, expr=f"quantity({value}, 'GB')")]) == {"C": verdict}
    # A bound that is far from being kept is none.
    bound = replace(claim, kind="bound", lo=None, expr=f"quantity({value}, 'GB')")
    assert verdicts(claims=[bound])["C"] == ("REPRODUCED" if value <= 0.6 else "CONFLICT")
