"""What a profile says, as tables of text and as JSON: the command line and the report show the same.

Shape suffixes: L layers, E experts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe.io.page import Table
from moe.profile.difference import LogProbabilityChange
from moe.profile.serving import StepLoad
from moe.profile.similarity import ClosestPair
from moe.profile.statistics import RoutingProfile, Share
from moe.profile.step import StepProfile
from moe.profile.trace import Comparison

# Held-out sequences are few and the experts many: a difference counts from four standard errors on.
CLEAR_Z = 4.0


def by_layer(p: RoutingProfile) -> Table:
    """Load, confidence and correlation of every layer."""
    columns = ["layer", "load entropy", "CV", "max/mean", "in a pass", "dropped at 1.25", "router entropy"]
    columns += ["confidence", "same as before", "by chance", "next layer"]
    drop, after = p.drop_rate_L(1.25), p.next_layer_information
    rows = []
    for i in range(len(p.counts_LE)):
        row = [f"{p.load_entropy_L[i]:.3f}", f"{p.load_cv_L[i]:.2f}", f"{p.max_over_mean_L[i]:.2f}"]
        row += [f"{p.pass_max_over_mean_L[i]:.2f}", f"{drop[i]:.2%}", f"{p.router_entropy_L[i]:.2f}"]
        row += [f"{p.top_probability_L[i]:.2f}", f"{p.repeat_rate_L[i]:.1%}", f"{p.expected_repeat_rate_L[i]:.1%}"]
        rows.append([str(i), *row, f"{after[i]:.2f}" if i < len(after) else ""])
    return Table(f"{p.tokens:,} tokens in {p.passes:,} passes", columns, rows)


def dropped(p: RoutingProfile) -> Table:
    """Share of the routed tokens that each counted capacity would drop."""
    rates = [p.drop_rate_L(factor) for factor in p.capacity_factors]
    rows = [[str(i), *(f"{float(rate[i]):.2%}" for rate in rates)] for i in range(len(p.counts_LE))]
    title = "routed tokens dropped, were an expert to take no more than the capacity factor times its even share"
    return Table(title, ["layer", *(f"factor {factor:g}" for factor in p.capacity_factors)], rows)


def dead(p: RoutingProfile) -> str:
    """The experts that next to nothing reaches, in a sentence."""
    found = p.dead_experts()
    shown = ", ".join(f"layer {i} expert {e}" for i, e in found[:8]) + (", ..." if len(found) > 8 else "")
    return f"experts with less than a tenth of the mean load: {len(found)}" + (f" ({shown})" if found else "")


def sources(p: RoutingProfile) -> list[Table]:
    """Of each pair of sources, the experts that they use most differently."""
    shares, found = p.sources, []
    names = list(shares)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            difference, z = p.specialisation(one, other)
            clear = (z.abs() > CLEAR_Z).sum(1)
            rows = []
            for layer in range(len(z)):
                ends = int(difference[layer].argmax()), int(difference[layer].argmin())
                cells = [f"{e}: {_share(shares[one], layer, e)} / {_share(shares[other], layer, e)}" for e in ends]
                rows.append([str(layer), f"{int(clear[layer])} of {z.shape[1]}", *cells])
            ends = f"most for {one}", f"most for {other}"
            sizes = f"{shares[one].sequences} and {shares[other].sequences} sequences"
            if 1 in (shares[one].sequences, shares[other].sequences):
                sizes += "; the error of one alone is unknown, so are clear differences"
            title = f"share of {one} / {other} that an expert serves, ± standard error; {sizes}"
            found.append(Table(title, ["layer", f"differ (|z| > {CLEAR_Z:g})", *ends], rows, ends))
    return found


def _share(share: Share, layer: int, expert: int) -> str:
    error = float(share.error_LE[layer, expert])
    return f"{float(share.mean_LE[layer, expert]):.1%} ± {'?' if math.isnan(error) else f'{error:.1%}'}"


def top_tokens(p: RoutingProfile, layer: int, show: Callable[[int], str], n: int = 8) -> Table:
    """The tokens that each expert of a layer takes most above its share; `show` makes text of an id.

    Raises:
        ValueError: tokens were not counted.
    """
    rows = []
    for e, best in enumerate(p.layer_top_tokens(layer, n)):
        rows.append([str(e), f"{float(p.load_LE[layer, e]):.1%}", "  ".join(show(i) for i, _ in best)])
    title = f"layer {layer}: the tokens an expert serves most above its share"
    return Table(title, ["expert", "load", "tokens"], rows, ("tokens",))


def duplicates(pairs: Sequence[ClosestPair]) -> Table:
    """The two experts of each layer whose weights are nearest to each other."""
    columns = ["layer", "closest pair", "cosine", "median pair", "by chance", "times chance"]
    rows = []
    for c in pairs:
        figures = f"{c.cosine:.4f}", f"{c.median:.4f}", f"{c.by_chance:.4f}", f"{c.cosine / c.by_chance:.1f}"
        rows.append([str(c.layer), f"{c.one} and {c.other}", *figures])
    return Table("closest experts, by the cosine of all their weights; copies have 1", columns, rows)


def steps(found: Sequence[StepLoad], title: str, expert_bytes: float = 0.0, bandwidth: float = 0.0) -> Table:
    """Decoding steps by batch size.

    Args:
        expert_bytes: of one expert in all layers; 0 leaves bytes and time out.
        bandwidth: GB/s of the memory that holds the weights.
    """
    columns = ["batch", "tokens per expert", "p5 to p95", "uniform", "busiest", "idle", "uniform", "experts", "uniform"]
    columns += ["GB per step", "ms per step"] if expert_bytes else []
    rows = []
    for s in found:
        row = [f"{s.batch:,}", f"{s.mean:.4g}", f"{s.tokens_p5:.0f} to {s.tokens_p95:.0f}"]
        row += [f"{s.tokens_p5_uniform:.0f} to {s.tokens_p95_uniform:.0f}", f"{s.busiest:.1f}"]
        row += [f"{s.idle:.1%}", f"{s.idle_uniform:.1%}", f"{s.distinct:.1f}", f"{s.distinct_uniform:.1f}"]
        if expert_bytes:
            gigabytes = s.distinct * expert_bytes / 1e9
            row += [_figure(gigabytes), _figure(gigabytes / bandwidth * 1e3)]
        rows.append(row)
    return Table(title, columns, rows)


def _figure(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def changes(found: Comparison) -> Table:
    """Two routings of the same tokens, layer by layer."""
    columns = ["layer", "tokens rerouted", "first choice", "slots", "|ln w - ln w'|"]
    rows = []
    for layer in range(len(found.changed_L)):
        shares = [f"{float(x[layer]):.3%}" for x in (found.changed_L, found.first_changed_L, found.moved_L)]
        weight = "" if found.log_weight_L is None else f"{float(found.log_weight_L[layer]):.2e}"
        rows.append([str(layer), *shares, weight])
    return Table(f"{found.tokens:,} tokens", columns, rows)


def log_probability_changes(found: Mapping[str, LogProbabilityChange]) -> Table:
    """Two models' probabilities of the same tokens, by source."""
    columns = ["source", "tokens", "|Δ ln p|", "Δ ln p", "p'/p - 1 - ln p'/p"]
    rows = [
        [name, f"{c.tokens:,}", f"{c.gap:.4g}", f"{c.gain:+.4g}", f"{c.divergence:.4g}"] for name, c in found.items()
    ]
    title = "log-probabilities of the text's tokens, from the first model to the second; nats per token"
    return Table(title, columns, rows, ("source",))


def as_json(p: RoutingProfile, pairs: Sequence[ClosestPair] = ()) -> dict[str, Any]:
    """Every figure, as JSON holds it; null for what has none: the weight of an idle expert, the error of one text."""
    names = ["load_entropy_L", "load_cv_L", "max_over_mean_L", "pass_max_over_mean_L", "router_entropy_L"]
    names += ["top_probability_L", "top_weight_L", "repeat_rate_L", "expected_repeat_rate_L", "next_layer_information"]
    names += ["counts_LE", "first_counts_LE", "coactivation_LEE", "next_layer_counts"]
    passes, load = p.load_over_time
    return _null_for_nan(
        {
            "tokens": p.tokens,
            "passes": p.passes,
            **{name: getattr(p, name).tolist() for name in names},
            "drop_rate_L": {f"{factor:g}": p.drop_rate_L(factor).tolist() for factor in p.capacity_factors},
            "weight_LE": p.weight_LE.tolist(),
            "dead_experts": p.dead_experts(),
            "closest_experts": [
                {
                    "layer": c.layer,
                    "experts": [c.one, c.other],
                    "cosine": c.cosine,
                    "median": c.median,
                    "chance": c.by_chance,
                }
                for c in pairs
            ],
            "load_over_time": {"passes": passes.tolist(), "load_NLE": load.tolist()},
            "sources": {
                name: {"sequences": s.sequences, "mean_LE": s.mean_LE.tolist(), "error_LE": s.error_LE.tolist()}
                for name, s in p.sources.items()
            },
        }
    )


def _null_for_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {key: _null_for_nan(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_null_for_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parts(p: StepProfile) -> Table:
    """The components of a step, the longest first, and the whole."""
    columns = ["component", "phase", "calls", "ms", "of the step", "GFLOP/s", "GB/s", "floor ms", "of the roofline"]
    rows = []
    for r in p.rows:
        cells = [r.component, r.phase, str(r.calls), f"{r.seconds * 1e3:,.2f}", f"{r.seconds / p.seconds:.1%}"]
        cells.append(f"{r.flop / r.seconds / 1e9:,.1f}" if r.flop and r.seconds else "")
        cells.append(f"{r.bytes / r.seconds / 1e9:,.1f}" if r.bytes and r.seconds else "")
        cells.append(f"{r.floor * 1e3:,.2f}" if r.floor is not None else "")
        cells.append(f"{r.roofline_fraction:.0%}" if r.roofline_fraction is not None else "")
        rows.append(cells)
    rate = sum(r.flop or 0.0 for r in p.rows) / p.seconds / 1e9
    all_of_it = [f"{p.seconds * 1e3:,.2f}", "", f"{rate:,.1f}", "", f"{p.floor * 1e3:,.2f}"]
    rows.append(["all", "", "", *all_of_it, f"{p.floor / p.seconds:.0%}"])
    where = f"{p.batch} x {p.seq_len} tokens" + (f" after {p.context}" if p.what == "decode" else "")
    title = f"{p.config}, {p.what}, {where}, {p.dtype}, {p.device}"
    return Table(title, columns, rows, words=("component", "phase"))


def ceilings(p: StepProfile) -> str:
    """Predicted beside measured, with nothing measured inside, and what the prediction is made of."""
    c = p.ceilings
    fp32 = "" if p.dtype == "float32" else f", {c.product_fp32 / 1e9:,.0f} in float32"
    return (
        f"predicted and measured: a step {p.floor * 1e3:,.2f} ms at this machine's ceilings, "
        f"{p.plain_seconds * 1e3:,.2f} ms with nothing measured inside\n"
        f"ceilings, measured: {c.product / 1e9:,.0f} GFLOP/s (a large product){fp32}, {c.copy / 1e9:,.0f} GB/s (a copy)"
    )
