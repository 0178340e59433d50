"""The article's figures against the planner: a verdict for each, computed and with its reason.

A row of configs/article/claims.toml has a kind and one Python expression over the names of `environment`. Verdicts:
EXTERNAL, a fact outside the model; REPRODUCED, inside [lo, hi]; WITH-ASSUMPTION, the same, but something was read that
nobody stated; UNIT-ERROR, the right figure in a wrong unit, off by a power of 100 or 1000 or in dimension;
UNDERDETERMINED, inputs that nobody knows decide it; CONFLICT, otherwise.

An expression can call all of Python: check only files that you would run.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe.config import CONFIG_DIR
from moe.errors import ConfigError
from moe.io.toml import read_file
from moe.plan.counts import params_sheet
from moe.plan.experts import experts_sheet
from moe.plan.hardware import load_hardware
from moe.plan.layout import Layout, load_layout
from moe.plan.memory import kv_bytes_per_token, serving_memory, stage_counts, training_memory
from moe.plan.models import Model, load_shape
from moe.plan.quantities import (
    ENVIRONMENT,
    Quantity,
    Sheet,
    assumed,
    dims_text,
    larger,
    number,
    parse_unit,
    quantity,
    unknown,
)
from moe.plan.serving import decode, ridge
from moe.plan.shape import Shape, dense
from moe.plan.speculation import DRAFTS
from moe.plan.sweeps import AXES
from moe.plan.train import Efficiency, mfu, train_cost, train_flops

CLAIMS_FILE = CONFIG_DIR / "article" / "claims.toml"
VERDICTS = ("REPRODUCED", "WITH-ASSUMPTION", "UNIT-ERROR", "CONFLICT", "UNDERDETERMINED", "EXTERNAL")
KINDS = ("external", "input", "derived", "bound")
TOLERANCE = 0.02  # of a figure without lo and hi, and of a power of 100 or 1000


@dataclass(frozen=True)
class Claim:
    """One row; `lo` and `hi` in `unit`, either of them absent for a bound."""

    id: str
    section: str
    text: str
    value: float
    unit: str
    kind: str
    verdict: str
    expr: str = ""
    lo: float | None = None
    hi: float | None = None
    why: str = ""

    def accepted(self) -> tuple[float, float]:
        """The interval that still counts as the article's figure, in `unit`."""
        if self.lo is None and self.hi is None:
            return self.value - TOLERANCE * abs(self.value), self.value + TOLERANCE * abs(self.value)
        return (-float("inf") if self.lo is None else self.lo), (float("inf") if self.hi is None else self.hi)


@dataclass(frozen=True)
class Verdict:
    """What came out for a claim."""

    claim: Claim
    verdict: str
    reason: str
    computed: Quantity | None = None

    @property
    def expected(self) -> bool:
        """Whether the verdict is the one that the file expects."""
        return self.verdict == self.claim.verdict


def load_claims(path: str | Path = CLAIMS_FILE) -> list[Claim]:
    """Read a claims file.

    Raises:
        ConfigError: not TOML, an unknown or missing key, an unknown kind or verdict, a row without an expression.
    """
    rows = read_file(Path(path)).get("claim", [])
    return [_claim(row, f"{Path(path).name}: {row.get('id', f'row {i + 1}')}") for i, row in enumerate(rows)]


def _claim(row: Mapping[str, Any], place: str) -> Claim:
    known = set(Claim.__dataclass_fields__)
    for key in row:
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.4)
            raise ConfigError(f"{place}: unknown key {key!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    for key in ("id", "section", "text", "value", "unit", "kind", "verdict"):
        if key not in row:
            raise ConfigError(f"{place}: {key} is missing")
    for key, choices in (("kind", KINDS), ("verdict", VERDICTS)):
        if row[key] not in choices:
            raise ConfigError(f"{place}: {key} = {row[key]!r}: must be one of {', '.join(choices)}")
    if (row["kind"] == "external") != (not row.get("expr")):
        raise ConfigError(f"{place}: expr: every kind but external needs an expression, and external has none")
    return Claim(**row)


def check_claims(claims: list[Claim] | None = None, model: Model = "gpt4-8k") -> list[Verdict]:
    """A verdict for each claim, of the model given.

    Raises:
        ConfigError: an expression that cannot be evaluated.
    """
    claims = claims if claims is not None else load_claims()
    names = environment(claims, model)
    return [_check(claim, names) for claim in claims]


class _Misfit(Exception):
    """The article's layout and the model do not go together."""


class _Names(dict[str, Any]):
    """Names of which some are made when an expression first reads them."""

    def __init__(self, known: Mapping[str, Any], made: Mapping[str, Callable[[], Any]]) -> None:
        super().__init__(known)
        self._made = made

    def __missing__(self, name: str) -> Any:
        self[name] = self._made[name]()
        return self[name]


def _fitting(plan: Callable[..., Any]) -> Callable[..., Any]:
    """`plan`, whose refusal of the model is the claim's failure, and not its expression's."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return plan(*args, **kwargs)
        except ConfigError as error:
            raise _Misfit(str(error)) from error

    return call


def _check(claim: Claim, names: _Names) -> Verdict:
    if claim.kind == "external":
        return Verdict(claim, "EXTERNAL", "a fact outside the model")
    try:
        value = quantity(eval(claim.expr, {"__builtins__": {}}, names))
        scale, dims = parse_unit(claim.unit)
    except _Misfit as error:
        return Verdict(claim, "CONFLICT", f"cannot be of this model: {error}")
    except ConfigError as error:
        raise ConfigError(f"claim {claim.id}: {claim.expr}: {error}") from None
    except Exception as error:  # a row is input: whatever its expression raises is about the row
        raise ConfigError(f"claim {claim.id}: {claim.expr}: {type(error).__name__}: {error}") from None
    value = replace(value, key=claim.id, unit=claim.unit if dims == value.dims else value.unit)
    verdict, reason = _judge(claim, value, scale, dims)
    return Verdict(claim, verdict, f"{reason}; {claim.why}" if claim.why else reason, value)


def _judge(claim: Claim, q: Quantity, scale: float, dims: Any) -> tuple[str, str]:
    low, high = claim.accepted()
    shown = _in_unit(q, claim.unit)
    if q.dims != dims:
        for power in (1, *(1000.0**n for n in range(1, 6))):
            if low <= q.value / power <= high:
                return "UNIT-ERROR", f"{q} it is: {dims_text(q.dims)}, where the claim says {claim.unit}"
        return "CONFLICT", f"{q}, of another dimension than {claim.unit}"
    value, least, most = (x / scale for x in (q.value, q.lo, q.hi))
    if q.unknowns:
        if least <= high and most >= low:
            return (
                "UNDERDETERMINED",
                f"{number(least)} to {number(most)} {claim.unit}: {', '.join(sorted(q.unknowns))}?",
            )
        factor = _unit_slip(lambda f: least <= high * f and most >= low * f)
        if factor:
            return "UNIT-ERROR", f"{number(least)} to {number(most)} {claim.unit}: the claim is off by {factor:g}"
        return "CONFLICT", f"{number(least)} to {number(most)} {claim.unit}, whatever is not known"
    if low <= value <= high:
        if q.assumptions:
            return "WITH-ASSUMPTION", f"{shown}, assuming {', '.join(sorted(q.assumptions))}"
        return "REPRODUCED", shown
    slack = TOLERANCE
    two_sided = 0 < low <= high < float("inf")  # a bound that is far from being kept is no slip of a unit
    factor = _unit_slip(lambda f: low * f * (1 - slack) <= value <= high * f * (1 + slack)) if two_sided else 0
    if factor:
        return "UNIT-ERROR", f"{shown}: off by {factor:g}"
    return "CONFLICT", f"{shown}, where {_range_text(low, high)} {claim.unit} would be the claim's"


def _unit_slip(fits: Callable[[float], bool]) -> float:
    """The power of 100 or 1000 by which a claim is off, or 0."""
    return next((f for f in (100.0, 1e3, 1e6, 1e9, 0.01, 1e-3, 1e-6, 1e-9) if fits(f)), 0.0)


def _in_unit(q: Quantity, unit: str) -> str:
    return str(replace(q, unit=unit)) if q.dims == parse_unit(unit)[1] else str(q)


def _range_text(low: float, high: float) -> str:
    if low == -float("inf"):
        return f"at most {number(high)}"
    return f"at least {number(low)}" if high == float("inf") else f"{number(low)} to {number(high)}"


# ------------------------------------------------------------------------------------------- what expressions can read


def environment(claims: list[Claim], model: Model) -> _Names:
    """The names that expressions may use, for one model and the shipped hardware and layouts."""
    shape = load_shape(model)
    by_id = {claim.id: claim for claim in claims}
    serve, train_layout = load_layout("gpt4-serve"), load_layout("gpt4-train")
    a100 = load_hardware("a100-40")
    shapes = {"gpt3": load_shape("gpt3")}
    cached: dict[str, Sheet] = {}

    def article(name: str) -> Quantity:
        """The figure of another claim, with its interval."""
        claim = by_id[name]
        q = quantity(claim.value, claim.unit, key=name)
        scale = parse_unit(claim.unit)[0]
        return replace(q, lo=claim.lo * scale, hi=claim.hi * scale) if claim.lo and claim.hi else q

    def sheet(of: Shape | str) -> Sheet:
        s = shapes[of] if isinstance(of, str) else of
        if s.name not in cached:
            cached[s.name] = params_sheet(s)
        return cached[s.name]

    def train(hardware: str = "a100-80", **arguments: Any) -> Sheet:
        return train_cost(shape, load_hardware(hardware), **arguments)

    def sequences(context: int, reserve: str = "0 B", kv_sharding: Any = "heads") -> Quantity:
        layout = serve.replace(kv_sharding=kv_sharding)
        kept = assumed(reserve, "serving.reserve") if quantity(reserve).value else quantity(reserve)
        return serving_memory(shape, layout, a100, context, kept)["memory.max_sequences"]

    known = {
        **ENVIRONMENT,
        **_functions(shape, serve),
        **_given(),
        "article": article,
        "params": sheet,
        "flops": sheet,
        "train": train,
        "sequences": _fitting(sequences),
        "model": shape,
        "gpt4": shape,
        "gpt3_flops": train_flops("gpt3", quantity(300 * 10**9, "token")),
        "serve": serve,
        "train_layout": train_layout,
        "h100_layout": load_layout("gpt4-train-h100"),
        "serving_memory": _fitting(lambda context: serving_memory(shape, serve, a100, context)),
        "id_bytes": next(n for n in (1, 2, 4, 8) if shape.vocab_size <= 256**n),
    }
    made = {
        "training_memory": _fitting(lambda: training_memory(shape, train_layout, load_hardware("a100-80"))),
        "serving_params": _fitting(
            lambda: [quantity(c.per_gpu(serve), "param") for c in stage_counts(shape, serve)],
        ),
    }
    return _Names(known, made)


def _functions(shape: Shape, serve: Layout) -> dict[str, Any]:
    """The planner's functions, with hardware by name."""

    def network(where: str) -> Quantity:
        own = 8 * load_hardware("a100-80").network
        return assumed(own if where == "within segments" else own / 4, f"network {where}", "Gbit/s")

    def price_range(hardware: str, weights: str) -> Quantity:
        """Cost of a token over all batches per pass: from a batch of one to the whole peak, at the hardware's price."""
        hw, layout = load_hardware(hardware), serve.replace(weights=weights)
        made = decode(shape, layout, hw, batch=1, context=8192, collectives=False)
        full = made["decode.cost"] * made["decode.utilisation"]
        middle = decode(shape, layout, hw, batch=128, context=8192, collectives=False)["decode.cost"]
        return unknown(full.to("USD/ktoken"), made["decode.cost"].to("USD/ktoken"), "batch per pass", "USD/ktoken",
                       middle.to("USD/ktoken"))  # fmt: skip

    return {
        "quantity": quantity,
        "unknown": lambda name, unit, lo, hi: unknown(lo, hi, name, unit),
        "max": larger,
        "len": len,
        "hardware": load_hardware,
        "ridge": lambda hardware, dtype: ridge(load_hardware(hardware), dtype),
        "mfu": lambda model, **arguments: mfu(model, load_hardware("a100-80"), **arguments),
        "decode": _fitting(lambda model, layout, hardware, **a: decode(model, layout, load_hardware(hardware), **a)),
        "kv": kv_bytes_per_token,
        "experts": _fitting(lambda batch: experts_sheet(shape.n_experts, shape.top_k, batch)),
        "assuming": lambda name, q: assumed(q, name),
        "network": network,
        "price_range": _fitting(price_range),
    }


def _given() -> dict[str, Any]:
    """Models and numbers that the article speaks of without being about them, and assumptions."""
    return {
        "dense_1T": dense("dense-1T", 25_600, 127),
        "eight_h100": Layout(name="eight-h100", tp=8, weights="bf16"),
        # PaLM's width and depth with plain multi-head attention, heads of 128 (Pope et al. 2022, arXiv:2211.05102).
        "palm_mha": dense("palm-mha", 18_432, 118, n_heads=48, head_dim=128, d_ff=73_728, gated=True),
        "tokens_per_word": assumed("2 token/word", "tokens per word", note="English text has about 1.3"),
        "bandwidth_overhead": assumed("2 x", "bandwidth overhead", note="the chart's factor; not derived"),
        "bandwidth_share": Efficiency().quantity("memory"),
        "h100_mfu": assumed("56 %", "MFU on H100s", note="what 55 days need; the article gives none"),
        "davinci_price": quantity("0.02 USD/ktoken", key="davinci_price", note="OpenAI's price list, 2023"),
        "default_drafts": DRAFTS,
        "axes": AXES,
    }
