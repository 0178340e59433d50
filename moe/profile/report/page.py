"""The report: everything a profile shows, with pictures, in one HTML file that opens without a network.

`report` lists its sections in their order; each is a function of the material, and further ones can be handed in.

Shape suffixes: L layers, E experts, N spans of passes or of training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe.io import figures
from moe.io.page import Html, Section, figure, folded, key, page, panels, table, tag
from moe.plan.hardware import load_hardware
from moe.profile import tables
from moe.profile.report import svg
from moe.profile.report.svg import Axis
from moe.profile.serving import StepLoad, decode_steps
from moe.profile.similarity import ClosestPair
from moe.profile.statistics import RoutingProfile

CARD = "h100-sxm"  # whose memory decoding steps are timed with
HISTOGRAM_BATCHES = (8, 64, 512)


@dataclass(frozen=True)
class Material:
    """What a report is made of."""

    name: str  # of the model
    text: str  # that it read
    profile: RoutingProfile
    ids_TLK: np.ndarray  # the experts of the profiled tokens, for decoding steps
    show: Callable[[int], str]  # what a token id looks like
    pairs: Sequence[ClosestPair] = ()
    expert_bytes: float = 0.0  # of one expert in all layers
    training: Sequence[dict[str, Any]] = field(default=())  # records with `tokens` and `load`, [L][E]


def report(m: Material, extra: Sequence[Section] = ()) -> str:
    """The HTML of the report.

    Args:
        extra: sections that come after those on routing, as of a profile of time.

    Raises:
        ValueError: nothing was profiled.
    """
    p = m.profile
    found = decode_steps(m.ids_TLK, p.n_experts)
    sections = [_summary(m), _load(p), _over_passes(p)]
    sections += [_over_training(m.training)] if m.training else []
    sections += [_sources(p)] if p.sources else []
    sections += [_token_classes(m), _together(p), _correlation(p), _steps(m, found), _serving(m, found)]
    sections += [_dead_and_duplicate(m), *extra]
    _, L, K = m.ids_TLK.shape
    subtitle = f"{L} layers, {p.n_experts} experts, {K} per token; {p.tokens:,} tokens of {m.text}"
    return page(f"Routing of {m.name}", subtitle, sections)


# ---------------------------------------------------------------------------------------------------------- sections


def _summary(m: Material) -> Section:
    p = m.profile
    busiest = np.unravel_index(int(p.load_LE.argmax()), p.load_LE.shape)
    cards = [
        (f"{p.tokens:,}", f"tokens in {p.passes:,} forward passes"),
        (f"{float(p.load_entropy_L.min()):.3f}", "least load entropy of a layer; 1 is even"),
        (f"{float(p.max_over_mean_L.max()):.2f}x", f"the mean: busiest, layer {busiest[0]} expert {busiest[1]}"),
        (f"{float(p.drop_rate_L(1.25).max()):.1%}", "of a layer's tokens dropped at capacity 1.25, at most"),
        (f"{len(p.dead_experts())}", "dead experts: below a tenth of the mean load"),
    ]
    names = list(p.sources)
    if len(names) > 1:
        _, z_LE = p.specialisation(names[0], names[1])
        clear = f"{int((z_LE.abs() > tables.CLEAR_Z).sum())} of {z_LE.numel()}"
        cards.append(
            (clear, f"experts differ between {names[0]} and {names[1]} by over {tables.CLEAR_Z:g} std. errors")
        )
    body = tag("div", *(tag("div", tag("b", value), tag("span", said)) for value, said in cards), class_="cards")
    terms = tag("p", _TERMS, class_="terms")
    return Section(
        "Summary",
        "How evenly each layer's experts are used, and how sure its router is.",
        [body, table(tables.by_layer(p)), terms],
    )


_TERMS = (
    "Load entropy: over its maximum, 1 when even. CV: standard deviation of the load over its mean. Max/mean: the "
    "busiest expert, of all tokens together; in a pass: within a forward pass, on average, which is what a step waits "
    "for. Router entropy: in nats, of the softmax over all experts. Confidence: mean probability of the likeliest. "
    "Same as before: how often a token's first choice is that of the token before it, and how often by chance. "
    "Next layer: mutual information of first choices in neighbouring layers, 0 independent, 1 determined."
)


def _load(p: RoutingProfile) -> Section:
    ratio_LE = p.load_LE.numpy() * p.n_experts
    L, E = ratio_LE.shape
    busiest, idlest = f"{ratio_LE.max():.2f}", f"{ratio_LE.min():.2f}"
    said = f"Load of every expert over the mean: busiest {busiest}x, idlest {idlest}x."
    picture = svg.heatmap(
        ratio_LE,
        Axis("layer"),
        Axis("expert"),
        said,
        width=max(400, 36 * E if E <= 32 else 7 * E),
        height=max(60, (22 if E <= 32 else 12) * min(L, 60)),
    )
    columns = ["layer", *map(str, range(E))]
    counts = tables.Table(
        "routed tokens", columns, [[str(i), *(f"{c:,}" for c in row)] for i, row in enumerate(p.counts_LE.tolist())]
    )
    body = [
        figure("Load", f"1 is an even share; busiest {busiest}, idlest {idlest}", picture),
        svg.scale(),
        table(tables.dropped(p)),
        folded("Tokens of every expert", table(counts)),
    ]
    return Section("Load", "How many times its even share each expert serves, layer by layer.", body)


def _over_passes(p: RoutingProfile) -> Section:
    passes, load_NLE = (t.numpy() for t in p.load_over_time)
    shown = []
    for layer in figures.shown_layers(load_NLE.shape[1]):
        said = f"within a pass the busiest has {float(p.pass_max_over_mean_L[layer]):.2f}x the mean"
        shown.append(_over(load_NLE[:, layer], "forward pass", float(passes.sum()), int(layer), said))
    says = (
        "The load from pass to pass, in the order the text was read: stripes are experts that a kind of text prefers."
    )
    return Section("Load over the passes", says, [panels(shown), svg.scale()])


def _over_training(records: Sequence[dict[str, Any]]) -> Section:
    load_NLE = np.array([r["load"] for r in records])
    shown = []
    for layer in figures.shown_layers(load_NLE.shape[1]):
        said = f"busiest at the end: {load_NLE[-1, layer].max() * load_NLE.shape[2]:.2f}x the mean"
        shown.append(_over(load_NLE[:, layer], "tokens trained on", float(records[-1]["tokens"]), int(layer), said))
    says = f"The load at each of {len(records):,} log points of the training run, of the steps since the one before."
    return Section("Load over training", says, [panels(shown), svg.scale()])


def _over(load_NE: np.ndarray, name: str, end: float, layer: int, said: str) -> Html:
    """A layer's experts down, time across."""
    E = load_NE.shape[1]
    label = f"Load of the experts of layer {layer} over time; {said}."
    picture = svg.heatmap(
        load_NE.T * E, Axis("expert"), Axis(name, end), label, width=320, height=max(110, min(240, 9 * E))
    )
    return figure(f"Layer {layer}", said, picture)


def _sources(p: RoutingProfile) -> Section:
    shares = p.sources
    names = list(shares)
    says = "The share of each source's tokens that an expert serves. " + (
        f"Bars reach {tables.CLEAR_Z:g} standard errors to each side, sequences being what is independent: where those "
        "of two sources are apart, the difference is no chance."
    )
    body: list[Html] = [key([(f"s{i % 6}", name) for i, name in enumerate(names)] + [("even", "even share")])]
    z_LE = p.specialisation(names[0], names[1])[1] if len(names) > 1 else None
    shown = []
    for layer in figures.shown_layers(len(p.counts_LE)):
        said = f"{p.n_experts} experts"
        if z_LE is not None:
            clear = int((z_LE[layer].abs() > tables.CLEAR_Z).sum())
            said = f"{clear} of {p.n_experts} experts differ between {names[0]} and {names[1]}"
        series = [
            (100 * s.mean_LE[layer].numpy(), 100 * tables.CLEAR_Z * s.error_LE[layer].numpy()) for s in shares.values()
        ]
        picture = svg.bars(series, f"Layer {layer}: {said}.", "expert", "% of tokens", 100 / p.n_experts)
        shown.append(figure(f"Layer {layer}", said, picture))
    return Section("Specialisation by source", says, [*body, panels(shown), *map(table, tables.sources(p))])


def _token_classes(m: Material) -> Section:
    """The top tokens of every expert, a layer at a time."""
    says = "The tokens that an expert serves most above its share of all tokens; hover to see how many times."
    p = m.profile
    L = len(p.counts_LE)
    # Large models have thousands of experts; the file should stay small.
    n = max(3, min(10, 20_000 // (L * p.n_experts)))
    layers: list[Html] = []
    try:
        for layer in range(L):
            rows = []
            for e, best in enumerate(p.layer_top_tokens(layer, n)):
                words = [
                    tag("code", m.show(i).replace(" ", "\u2423"), title=f"id {i}: {lift:.1f}x") for i, lift in best
                ]
                rows.append(
                    tag(
                        "tr",
                        tag("td", str(e), class_="n"),
                        tag("td", f"{float(p.load_LE[layer, e]):.1%}", class_="n"),
                        tag("td", *words, class_="w"),
                    )
                )
            head = tag(
                "tr",
                *(
                    tag("th", name, class_=side, scope="col")
                    for name, side in (("expert", "n"), ("load", "n"), ("tokens", "w"))
                ),
            )
            whole = tag("table", tag("thead", head), tag("tbody", *rows))
            box = tag(
                "div", whole, class_="scroll tokens", tabindex="0", role="region", aria_label=f"Tokens of layer {layer}"
            )
            layers.append(folded(f"Layer {layer}", box, is_open=layer == L // 2))
    except ValueError as error:
        layers = [tag("p", f"Not counted: {error}.")]
    return Section("Token classes", says, layers)


def _together(p: RoutingProfile) -> Section:
    says = "How much more often than by chance two experts serve a token together; chance goes by their loads."
    lift_LEE = p.coactivation_lift_LEE.numpy()
    if p.counts_LE.sum() == p.first_counts_LE.sum():
        return Section("Co-activation", says, [tag("p", "One expert serves each token: there are no pairs.")])
    shown = []
    for layer in figures.shown_layers(len(lift_LEE)):
        best = np.nan_to_num(lift_LEE[layer], nan=0.0)
        i, j = sorted(int(x) for x in np.unravel_index(best.argmax(), best.shape))
        said = f"most: {i} and {j}, {best[i, j]:.1f}x as often as by chance"
        picture = svg.heatmap(
            lift_LEE[layer], Axis("expert"), Axis("expert"), f"Co-activation in layer {layer}; {said}.", 300, 300
        )
        shown.append(figure(f"Layer {layer}", said, picture))
    return Section("Co-activation", says, [panels(shown), svg.scale("chance")])


def _correlation(p: RoutingProfile) -> Section:
    """Consecutive tokens, and neighbouring layers."""
    says = (
        "Whether a token's first choice follows from that of the token before it, or from its own in the layer before."
    )
    repeats = [100 * p.repeat_rate_L.numpy(), 100 * p.expected_repeat_rate_L.numpy()]
    said = "first choice is that of the token before"
    picture = svg.bars(
        [(r, None) for r in repeats], f"Share of tokens whose {said}, per layer.", "layer", "% of tokens", None
    )
    body = [
        key([("s0", "this text"), ("s1", "were tokens independent, with the same loads")]),
        panels([figure("Consecutive tokens", said, picture)]),
    ]
    shown = []
    counts = p.next_layer_counts.double().numpy()
    for layer in figures.shown_layers(len(counts)) if len(counts) else ():
        joint = counts[layer]
        expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True) / joint.sum()
        lift = np.divide(joint, expected, out=np.full_like(joint, np.nan), where=expected > 0)
        told = f"mutual information {float(p.next_layer_information[layer]):.2f} of the smaller entropy"
        label = f"First choices in layer {layer} against those in layer {layer + 1}: {told}."
        drawn = svg.heatmap(lift, Axis(f"layer {layer}"), Axis(f"layer {layer + 1}"), label, 300, 300)
        shown.append(figure(f"Layer {layer} to {layer + 1}", told, drawn))
    body += [panels(shown), svg.scale("chance")] if shown else []
    return Section("Correlation", says, body)


def _steps(m: Material, found: Sequence[StepLoad]) -> Section:
    eight = next(s for s in found if s.batch == 8)
    says = (
        "Tokens that one expert gets in one decoding step. Each sequence of the batch adds one token, drawn from "
        "anywhere in the trace, as independent requests would be; the dashed line is uniform routing, exactly. A batch "
        f"of 8 may give an expert 8 tokens or none: none, here, with probability {eight.idle:.1%} (uniform "
        f"{eight.idle_uniform:.1%})."
    )
    shown = []
    for s in (s for s in found if s.batch in HISTOGRAM_BATCHES):
        spread, even = (s.tokens_p5, s.tokens_p95), (s.tokens_p5_uniform, s.tokens_p95_uniform)
        said = "mean {:g}; 5% to 95%: {:.0f} to {:.0f}, uniform {:.0f} to {:.0f}".format(s.mean, *spread, *even)
        label = f"Tokens of an expert in a step of {s.batch} sequences: {said}."
        picture = svg.histogram(s.mass, s.mass_uniform, label, "tokens of an expert", "% of experts")
        shown.append(figure(f"Batch {s.batch}", said, picture))
    body = [key([("s0", "this trace"), ("even", "uniform routing (binomial)")]), panels(shown)]
    return Section("Decoding steps", says, body)


def _serving(m: Material, found: Sequence[StepLoad]) -> Section:
    E = m.profile.n_experts
    batch = [float(s.batch) for s in found]
    read = svg.lines(
        batch,
        [("even", [s.distinct_uniform for s in found]), ("line s0", [s.distinct for s in found])],
        f"Distinct experts that a decoding step reads, of {E}, by batch size.",
        "sequences in the batch",
        "experts",
    )
    tokens = svg.lines(
        batch,
        [
            ("even", [s.tokens_p5_uniform for s in found]),
            ("even", [s.tokens_p95_uniform for s in found]),
            ("line s6", [s.mean for s in found]),
            ("line s1", [s.busiest for s in found]),
        ],
        "Tokens of an expert in a decoding step by batch size: mean, busiest, and 5% to 95%.",
        "sequences in the batch",
        "tokens",
        band=([s.tokens_p5 for s in found], [s.tokens_p95 for s in found]),
        y_log=True,
    )
    entries = [("s0", "this trace"), ("s1", "busiest expert"), ("s6", "mean"), ("even", "uniform routing")]
    bandwidth = load_hardware(CARD).bandwidth.to("GB/s")
    title = "one decoding step; uniform: independent choices at even load"
    says = "What a server reads and computes in a step, by batch size."
    if m.expert_bytes:
        title += f"; weights of the experts as loaded, time at {bandwidth:,.0f} GB/s (one H100)"
        says += " The weights of every expert that a token reaches are read once, however many tokens share them."
    shown = [
        figure("Experts read", "by at least one token", read),
        figure("Tokens of an expert", "band: 5% to 95%", tokens),
    ]
    body = [key(entries), panels(shown), table(tables.steps(found, title, m.expert_bytes, bandwidth))]
    return Section("Serving", says, body)


def _dead_and_duplicate(m: Material) -> Section:
    says = (
        "Experts that hardly any token reaches, and the two of each layer whose weights are most alike: copies have a "
        "cosine of 1, independent random weights at most about what stands under chance."
    )
    said = tables.dead(m.profile)
    body = [tag("p", said[0].upper() + said[1:] + ".")]
    if m.pairs:
        body.append(table(tables.duplicates(m.pairs)))
    else:
        body.append(tag("p", "The experts' matrices are not known here, so they are not compared."))
    return Section("Dead and duplicate experts", says, body)
