"""Parameters and forward FLOPs of a model, counted by formula.

Attention counts 2 d q + 2 d kv per layer, where the query width q = heads x head width is free of the model width d;
an expert 3 d f (gated) or 2 d f; the router d E. Tests hold the counts against the parameters of the built model, and
the FLOPs against torch's counter.
"""

from dataclasses import dataclass
from typing import Literal

from moe.plan.models import Model, load_shape
from moe.plan.quantity import Quantity, Sheet, quantity
from moe.plan.shape import Attention, Layer, Mlp, Shape

ActiveConvention = Literal["none", "output", "both"]


@dataclass(frozen=True)
class Params:
    """Parameter counts of a whole model, all layers together.

    `active` is what one token uses, under the three conventions in use for the embeddings: "none" of them, the
    "output" layer only (it is multiplied with, the input embedding is looked up), or "both". With tied embeddings
    the one matrix is counted once, as `embedding`; `head` is then 0 and "output" equals "both". Learned positions
    count as part of the input embedding. Biases are in what they belong to, and once more, together, in `biases`.
    """

    total: int
    embedding: int
    head: int
    attention: int
    expert: int  # one of the experts, in all layers that have them; 0 without
    experts: int  # all of them
    router: int
    norms: int
    active: dict[ActiveConvention, int]
    shared: int = 0  # shared experts, which serve every token
    dense: int = 0  # the MLPs of layers without experts
    biases: int = 0  # of the layers: added, never multiplied with
    biases_active: int = 0  # those that one token uses


def params(model: Model) -> Params:
    """Count the parameters of a model: a `Config`, a `Shape`, a shipped name, or a path to a .toml or a config.json.

    Raises:
        ConfigError: no such model, or one that cannot be.
    """
    shape = load_shape(model)
    d = shape.d_model
    embedding = shape.vocab_size * d + shape.positions * d
    head = (0 if shape.tied else shape.vocab_size * d) + shape.head_biases
    attention = expert = experts = router = norms = shared = dense = biases = biases_active = used_experts = 0
    for layer, n in shape.kinds.items():
        a, m = layer.attention, layer.mlp
        attention += n * attention_weights(d, a) + n * a.biases
        norms += n * (layer.norms + a.norms)
        one = mlp_weights(d, m) + m.biases
        if m.n_experts:
            expert += n * one
            experts += n * m.n_experts * one
            used_experts += n * m.top_k * one
            router += n * (d * m.n_experts + m.router_biases)
            shared += n * shared_weights(d, m)
        else:
            dense += n * one
        biases += n * (a.biases + max(1, m.n_experts) * m.biases + m.router_biases)
        biases_active += n * (a.biases + max(1, m.top_k) * m.biases + m.router_biases)
    norms += shape.final_norms
    used = attention + used_experts + shared + dense + router + norms
    output = shape.vocab_size * d + shape.head_biases
    return Params(
        total=embedding + head + attention + experts + shared + dense + router + norms,
        embedding=embedding,
        head=head,
        attention=attention,
        expert=expert,
        experts=experts,
        router=router,
        norms=norms,
        active={
            "none": used,
            "output": used + output,
            "both": used + embedding + head,
        },
        shared=shared,
        dense=dense,
        biases=biases,
        biases_active=biases_active,
    )


def attention_weights(d: int, a: Attention) -> int:
    """Elements of one layer's attention matrices, biases and norms left out.

    Multi-head latent attention: DeepSeek-V2 (arXiv:2405.04434), section 2.1 and appendix C.
    """
    if not a.kv_rank:
        return (
            2 * d * a.q + 2 * d * a.kv
            if a.v_dim == a.head_dim
            else d * (a.q + a.kv) + d * a.v_dim * (a.n_kv_heads + a.n_heads)
        )
    queries = d * a.q_rank + a.q_rank * a.q if a.q_rank else d * a.q
    latents = d * (a.kv_rank + a.rope_dim)
    unpacked = a.kv_rank * a.n_heads * (a.head_dim - a.rope_dim + a.v_dim)
    return queries + latents + unpacked + a.n_heads * a.v_dim * d


def mlp_weights(d: int, m: Mlp) -> int:
    """Elements of the matrices of one layer's dense MLP, or of one of its experts."""
    return m.matrices * d * m.d_ff


def shared_weights(d: int, m: Mlp) -> int:
    """Elements of one layer's shared experts and their gate."""
    return m.matrices * d * m.shared_d_ff + (d if m.shared_gate else 0)


# ------------------------------------------------------------------------------------------------------------- FLOPs


def flops_per_token(model: Model, context: int = 0, causal: bool = True) -> int:
    """Forward FLOPs of one token; a multiply-add is 2. Training costs three times this (backward = 2 x forward).

    2 x the active parameters that multiply (output layer included; input embedding, norms and biases not), plus 4 q ctx
    per layer for scores and weighted values. ctx is `context`, the sequence length, or half of it with `causal` (the
    mean over the positions of what they may see); 0 is the convention "2 N" / "6 N" that leaves attention out. Norms,
    softmax, rotations and activations are not counted, as is usual.
    """
    shape = load_shape(model)
    counts = params(shape)
    return 2 * _multiplied(shape, counts) + attention_flops(shape, context, causal)


def dense_flops_per_token(model: Model, context: int = 0, causal: bool = True) -> int:
    """As `flops_per_token`, for the dense model of the same size: every expert serves every token."""
    shape = load_shape(model)
    idle = sum(
        n * (layer.mlp.n_experts - layer.mlp.top_k) * mlp_weights(shape.d_model, layer.mlp)
        for layer, n in shape.kinds.items()
    )
    return 2 * (_multiplied(shape, params(shape)) + idle) + attention_flops(shape, context, causal)


def attention_flops(model: Model, context: int, causal: bool = True) -> int:
    """Forward FLOPs per token of attention scores and weighted values, all layers; `context` and `causal` as above."""
    shape = load_shape(model)
    total = 0
    for layer, n in shape.kinds.items():
        a = layer.attention
        seen = _seen_twice(context, a.window, causal)
        total += n * a.n_heads * (a.head_dim + a.v_dim) * seen
    return total


def _seen_twice(context: int, window: int, causal: bool) -> int:
    """Twice the positions that a token sees, on average over a sequence of `context`."""
    if not window or window >= context:
        return context if causal else 2 * context
    if not causal:
        return 2 * window
    # The first `window` positions see half of it on average, the rest all of it.
    return round(window * (2 * context - window) / context)


def _multiplied(shape: Shape, counts: Params) -> int:
    """Parameters that one token is multiplied with."""
    return counts.active["output"] - counts.norms - counts.biases_active - shape.head_biases


# -------------------------------------------------------------------------------------------- quantities, with formulas


def params_sheet(model: Model, context: int = 0) -> Sheet:
    """Every count and the forward FLOPs as quantities with their formulas; `context` as in `flops_per_token`."""
    shape = load_shape(model)
    counts = params(shape)
    sheet = Sheet()
    d = quantity(shape.d_model, key="d")
    parts: dict[str, list[Quantity]] = {}
    for i, (layer, n) in enumerate(shape.kinds.items()):
        suffix = "" if len(shape.kinds) == 1 else f".{i + 1}"
        for name, q in _layer_quantities(sheet, layer, n, d, suffix).items():
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
    _flops_quantities(sheet, shape, counts, context)
    return sheet


def _layer_quantities(sheet: Sheet, layer: Layer, n: int, d: Quantity, suffix: str) -> dict[str, Quantity]:
    """The quantities of `n` layers of one kind."""
    a, m = layer.attention, layer.mlp
    found: dict[str, Quantity] = {}
    inputs: dict[str, Quantity | float]
    if a.kv_rank:
        queries = "d * q_rank + q_rank * q" if a.q_rank else "d * q"
        formula = f"{queries} + d * (kv_rank + rope) + kv_rank * heads * (nope + v) + heads * v * d"
        inputs = {"q_rank": a.q_rank, "kv_rank": a.kv_rank, "rope": a.rope_dim, "nope": a.head_dim - a.rope_dim}
        inputs |= {"heads": a.n_heads, "v": a.v_dim, "q": a.q}
    else:
        inputs = {"q": a.q, "kv": a.kv}
        formula = "2 * d * q + 2 * d * kv"
    made = {
        "attention": (f"param * layers * ({formula} + biases)", {**inputs, "biases": a.biases, "d": d, "layers": n})
    }
    mlp: dict[str, Quantity | float] = {"matrices": m.matrices, "d": d, "f": m.d_ff, "biases": m.biases, "layers": n}
    if m.n_experts:
        one = "param * layers * (matrices * d * f + biases)"
        made["expert"] = (one, mlp)
        made["experts"] = (f"experts * {one}", {**mlp, "experts": m.n_experts})
        made["used_experts"] = (f"top_k * {one}", {**mlp, "top_k": m.top_k})
        router: dict[str, Quantity | float] = {"d": d, "experts": m.n_experts, "biases": m.router_biases, "layers": n}
        made["router"] = ("param * layers * (d * experts + biases)", router)
        if m.shared_d_ff:
            shared: dict[str, Quantity | float]
            shared = {"matrices": m.matrices, "d": d, "f": m.shared_d_ff, "gate": int(m.shared_gate), "layers": n}
            made["shared"] = ("param * layers * (matrices * d * f + gate * d)", shared)
    else:
        made["dense"] = ("param * layers * (matrices * d * f + biases)", mlp)
    made["norms"] = ("param * layers * norms", dict(layers=n, norms=layer.norms + a.norms))
    for name, (text, values) in made.items():
        key = f"params.{name}{suffix}" if suffix or name == "norms" else f"params.{name}"
        found[name] = sheet.derive(key + (".layers" if name == "norms" else ""), "param", text, **values)
    return found


def _sum(sheet: Sheet, key: str, parts: list[Quantity], final: int = 0) -> Quantity:
    """The sum over kinds of layers under `key`; a single part already stands there."""
    if len(parts) == 1 and not final and parts[0].key == key:
        return parts[0]
    names = {f"kind_{i + 1}": part for i, part in enumerate(parts)}
    formula = " + ".join([*names, *(["param * final"] if final else [])]) or "0 * param"
    return sheet.derive(key, "param", formula, **names, **({"final": final} if final else {}))


def _flops_quantities(sheet: Sheet, shape: Shape, counts: Params, context: int) -> None:
    unused = counts.norms + counts.biases_active + shape.head_biases
    kinds = shape.kinds.items()
    attention = "0 * FLOP/token"
    inputs: dict[str, Quantity | float] = {}
    if context:
        terms = []
        for i, (layer, n) in enumerate(kinds):
            a = layer.attention
            width = a.n_heads * (a.head_dim + a.v_dim)
            terms.append(f"layers_{i} * width_{i} * 2 * seen_{i}")
            inputs |= {f"layers_{i}": n, f"width_{i}": width, f"seen_{i}": _seen_twice(context, a.window, True) / 2}
        attention = f"FLOP/token * ({' + '.join(terms)})"
    note = f"causal, mean over a sequence of {context}" if context else "attention scores left out: the convention 2 N"
    sheet.derive("flops.attention", "GFLOP/token", attention, note, **inputs)
    sheet.derive(
        "flops.forward", "GFLOP/token", "2 * FLOP/param * (active - param * unused) / token + attention",
        active=sheet["params.active.output"], unused=unused, attention=sheet["flops.attention"],
    )  # fmt: skip
    idle = sum(
        n * (layer.mlp.n_experts - layer.mlp.top_k) * mlp_weights(shape.d_model, layer.mlp) for layer, n in kinds
    )
    sheet.derive(
        "flops.dense", "GFLOP/token", "forward + 2 * FLOP/param * param * idle / token",
        "the dense model of the same size", forward=sheet["flops.forward"], idle=idle,
    )  # fmt: skip
    sheet.derive(
        "flops.training", "GFLOP/token", "3 * forward", "backward = 2 x forward", forward=sheet["flops.forward"]
    )
