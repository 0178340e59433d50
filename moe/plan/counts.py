"""Parameters of a model, counted once: a formula for each component (moe/plan/weights.py), evaluated as quantities.

Attention counts 2 d q + 2 d kv per layer, where the query width q = heads x head width is free of the model width d;
an expert 3 d f (gated) or 2 d f; the router d E. Tests hold the counts against the parameters of the built model.
"""

from dataclasses import dataclass, field
from typing import Literal

from moe.plan.bounds import whole
from moe.plan.flops import TRAINING, dense_flops_per_token, flops_per_token, scores_width, seen_twice
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Quantity, Sheet, quantity
from moe.plan.shape import Layer, Shape
from moe.plan.weights import Formula, attention, mlp, router, shared

ActiveConvention = Literal["none", "output", "both"]


@dataclass(frozen=True)
class Params:
    """Parameter counts of a whole model, all layers together, biases with what they belong to.

    `active` is what one token uses, under the three conventions in use for the embeddings: "none" of them, the
    "output" layer only (it is multiplied with, the input embedding is looked up), or "both". With tied embeddings
    the one matrix is counted once, as `embedding`; `head` is then 0 and "output" equals "both". Learned positions
    count as part of the input embedding.
    """

    total: int
    embedding: int
    head: int
    attention: int
    expert: int  # one of the experts, in all layers that have them; 0 without
    experts: int  # all of them
    shared: int  # shared experts, which serve every token
    dense: int  # the MLPs of layers without experts
    router: int
    norms: int
    active: dict[ActiveConvention, int] = field(hash=False)

    @property
    def block_matrices(self) -> int:
        """Of attention, experts and dense MLPs: what Muon updates, and what autocast copies."""
        return self.attention + self.experts + self.shared + self.dense


def params(model: Model) -> Params:
    """Count the parameters of a model: a `Config`, a `Shape`, a shipped name, or a path to a .toml or a config.json.

    Raises:
        ConfigError: no such model, or one that cannot be.
    """
    sheet = _counts(load_shape(model))

    def count(name: str) -> int:
        value = sheet[f"params.{name}"].value
        assert isinstance(value, int)
        return value

    names = ("total", "embedding", "head", "attention", "expert", "experts", "shared", "dense", "router", "norms")
    return Params(
        **{name: count(name) for name in names},
        active={"none": count("active.none"), "output": count("active.output"), "both": count("active.both")},
    )


def params_sheet(model: Model, context: int = 0) -> Sheet:
    """Every count and the forward FLOPs as quantities with their formulas; `context` as in `flops_per_token`."""
    whole(0, context=context)
    shape = load_shape(model)
    sheet = _counts(shape)
    _flops_quantities(sheet, shape, context)
    return sheet


def _counts(shape: Shape) -> Sheet:
    """Every parameter count, under params.COMPONENT."""
    sheet = Sheet()
    d = quantity(shape.d_model, key="d")
    parts: dict[str, list[Quantity]] = {}
    for i, (layer, n) in enumerate(shape.kinds.items()):
        suffix = "" if len(shape.kinds) == 1 else f".{i + 1}"
        for name, q in _layer_quantities(sheet, shape, layer, n, suffix).items():
            parts.setdefault(name, []).append(q)
    for name in ("attention", "expert", "experts", "shared", "dense", "router", "norms"):
        _sum(sheet, f"params.{name}", parts.get(name, []), final=shape.final_norms if name == "norms" else 0)
    sheet.derive(
        "params.embedding", "param", "param * (vocab + positions) * d",
        vocab=shape.vocab_size, positions=shape.positions, d=d,
    )  # fmt: skip
    tied = "tied to the input embedding" if shape.tied else ""
    sheet.derive(
        "params.head", "param", "param * biases" if shape.tied else "param * (vocab * d + biases)", tied,
        vocab=shape.vocab_size, d=d, biases=shape.head_biases,
    )  # fmt: skip
    names = ("attention", "experts", "shared", "dense", "router", "norms", "embedding", "head")
    inputs = {name: sheet[f"params.{name}"] for name in names}
    sheet.derive("params.total", "param", " + ".join(names), **inputs)
    used = {name: sheet[f"params.{name}"] for name in ("attention", "shared", "dense", "router", "norms")}
    sheet.derive(
        "params.active.none", "param", "attention + used_experts + shared + dense + router + norms",
        used_experts=_sum(sheet, "params.used_experts", parts.get("used_experts", [])), **used,
    )  # fmt: skip
    none = sheet["params.active.none"]
    sheet.derive(
        "params.active.output", "param", "none + param * vocab * d + param * biases",
        none=none, vocab=shape.vocab_size, d=d, biases=shape.head_biases,
    )  # fmt: skip
    sheet.derive(
        "params.active.both", "param", "none + embedding + head",
        none=none, embedding=sheet["params.embedding"], head=sheet["params.head"],
    )  # fmt: skip
    return sheet


def _layer_quantities(sheet: Sheet, shape: Shape, layer: Layer, n: int, suffix: str) -> dict[str, Quantity]:
    """The quantities of `n` layers of one kind."""
    d, a, m = shape.d_model, layer.attention, layer.mlp
    found: dict[str, Quantity] = {}

    def add(name: str, part: Formula, biases: int | None = None, times: str = "", **inputs: int) -> None:
        count = part.text if biases is None else f"{part.text} + biases"
        text = f"{f'{times} * ' if times else ''}param * layers * ({count})"
        values: dict[str, Quantity | float] = {**part.inputs, **inputs, "d": quantity(d, key="d"), "layers": n}
        if biases is not None:
            values["biases"] = biases
        found[name] = sheet.derive(f"params.{name}{suffix}", "param", text, **values)

    add("attention", attention(d, a), a.biases)
    one = mlp(d, m)
    if m.n_experts:
        add("expert", one, m.biases)
        add("experts", one, m.biases, "experts", experts=m.n_experts)
        add("used_experts", one, m.biases, "top_k", top_k=m.top_k)
        add("router", router(d, m), m.router_biases)
        if m.shared_d_ff:
            add("shared", shared(d, m))
    else:
        add("dense", one, m.biases)
    found["norms"] = sheet.derive(
        f"params.norms{suffix}.layers", "param", "param * layers * norms", layers=n, norms=layer.norms + a.norms
    )
    return found


def _sum(sheet: Sheet, key: str, parts: list[Quantity], final: int = 0) -> Quantity:
    """The sum over kinds of layers under `key`; a single part already stands there."""
    if len(parts) == 1 and not final and parts[0].key == key:
        return parts[0]
    names = {f"kind_{i + 1}": part for i, part in enumerate(parts)}
    formula = " + ".join([*names, *(["param * final"] if final else [])]) or "0 * param"
    return sheet.derive(key, "param", formula, **names, **({"final": final} if final else {}))


def _flops_quantities(sheet: Sheet, shape: Shape, context: int) -> None:
    attention = "0 * FLOP/token"
    inputs: dict[str, Quantity | float] = {}
    if context:
        terms = []
        for i, (layer, n) in enumerate(shape.kinds.items()):
            a = layer.attention
            terms.append(f"layers_{i} * width_{i} * 2 * seen_{i}")
            inputs |= {f"layers_{i}": n, f"width_{i}": scores_width(a), f"seen_{i}": seen_twice(context, a.window) / 2}
        attention = f"FLOP/token * ({' + '.join(terms)})"
    note = f"causal, mean over a sequence of {context}" if context else "attention scores left out: the convention 2 N"
    sheet.derive("flops.attention", "GFLOP/token", attention, note, **inputs)
    active, products = sheet["params.active.output"], flops_per_token(shape)
    sheet.derive(
        "flops.forward", "GFLOP/token", "2 * FLOP/param * (active - param * unused) / token + attention",
        active=active, unused=active.value - products // 2, attention=sheet["flops.attention"],
    )  # fmt: skip
    sheet.derive(
        "flops.dense", "GFLOP/token", "forward + 2 * FLOP/param * param * idle / token",
        "the dense model of the same size", forward=sheet["flops.forward"],
        idle=(dense_flops_per_token(shape) - products) // 2,
    )  # fmt: skip
    sheet.derive(
        "flops.training", "GFLOP/token", f"{TRAINING} * forward", "backward = 2 x forward",
        forward=sheet["flops.forward"],
    )  # fmt: skip
