"""Training our own models on one device: peak memory, and the time of a step.

What is counted here is what moe.model, moe.train and the kernels really hold, not what a framework might: weights,
gradients and optimizer states in float32, under autocast bfloat16 copies of the weights beside them, and the tensors
that each block saves for its backward pass.
"""

from pathlib import Path
from typing import Literal, get_args

from moe.config import Config, load_config
from moe.io.toml import require
from moe.kernels.loss import CHUNK_ELEMENTS
from moe.plan.bounds import share, whole
from moe.plan.counts import params
from moe.plan.flops import TRAINING, flops_per_token, head_flops, layer_flops
from moe.plan.hardware import Hardware
from moe.plan.quantities import Quantity, Sheet, quantity
from moe.plan.shape import Layer, Shape, shape_of
from moe.plan.sizes import NARROW, WIDE, moment_bytes, saved_elements, update_bytes
from moe.plan.weights import attention_weights, head_weights, mlp_weights

Dtype = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "muon"]
Checkpointing = Literal["none", "selective", "full"]  # moe/recompute.py


def device_memory(
    config: Config | str | Path,
    *,
    micro_batch: int | None = None,
    seq_len: int | None = None,
    dtype: Dtype = "fp32",
    optimizer: Optimizer | None = None,
    activation_checkpointing: Checkpointing | None = None,
) -> Sheet:
    """Peak memory of training a model on one device, beside what the process needs before the model is there.

    Arguments that are not given come from the configuration's [train].

    Args:
        micro_batch: sequences of one forward pass. seq_len: tokens of a sequence.
        dtype: what products compute in; "bf16" is autocast.
        optimizer: "adamw" (two float32 moments) or "muon" (one for the blocks' matrices, two for the rest).
        activation_checkpointing: what a block keeps: "none" recomputes nothing, "full" everything but its input.

    Returns:
        device.weights, .copies (bfloat16, under autocast), .gradients, .optimizer, .activations, .loss, .working, and
        device.peak: the largest of device.at_loss, .at_first_block and .at_last_block of the backward pass.

    Raises:
        ConfigError: a size that cannot be.
    """
    cfg = config if isinstance(config, Config) else load_config(config)
    t = cfg.train
    batch = micro_batch if micro_batch is not None else (t.micro_batch or t.batch_size)
    length = seq_len if seq_len is not None else (t.seq_len or cfg.max_seq_len)
    whole(micro_batch=batch, seq_len=length)
    optimizer, mode = optimizer or t.optimizer, activation_checkpointing or t.activation_checkpointing
    for name, value, kind in (
        ("dtype", dtype, Dtype), ("optimizer", optimizer, Optimizer), ("activation_checkpointing", mode, Checkpointing)
    ):  # fmt: skip
        require(value in get_args(kind), name, value, f"must be one of {', '.join(get_args(kind))}")
    sheet = Sheet()
    _states(sheet, cfg, dtype, optimizer)
    tokens = quantity(batch * length, "token")
    sheet.put("device.tokens", tokens, "token", "of a micro-batch")
    _activations(sheet, cfg, dtype, tokens, mode)
    _loss(sheet, cfg, dtype, tokens)
    _working(sheet, cfg, dtype, tokens)
    accumulates = batch < t.batch_size
    _peak(sheet, cfg, accumulates)
    return sheet


def _states(sheet: Sheet, cfg: Config, dtype: Dtype, optimizer: str) -> None:
    counts = params(cfg)
    total = quantity(counts.total, "param", key="params.total")
    sheet.derive("device.weights", "MB", f"{WIDE} * byte/param * params", params=total)
    # Under autocast every matrix has a bfloat16 copy until the backward pass is done with it.
    copied = counts.block_matrices if dtype == "bf16" else 0
    sheet.derive(
        "device.copies", "MB", f"{NARROW} * byte/param * param * copied", "for products in bfloat16", copied=copied
    )
    sheet.derive("device.gradients", "MB", f"{WIDE} * byte/param * params", params=total)
    muon = counts.block_matrices if optimizer == "muon" else 0
    sheet.derive(
        "device.optimizer", "MB",
        f"byte/param * ({moment_bytes('adamw')} * (params - param * muon) + {moment_bytes('muon')} * param * muon)",
        "AdamW keeps two moments, Muon one, in float32", params=total, muon=muon,
    )  # fmt: skip


def _activations(sheet: Sheet, cfg: Config, dtype: Dtype, tokens: Quantity, mode: Checkpointing) -> None:
    """What a block saves, per token: `saved_elements`, router scores and their order, the scores' maxima.

    Under autocast each of the three projections saves a bfloat16 copy of its input, the experts a fourth; the residual
    stream and the router's input stay float32.
    """
    size, shape = _size(dtype), shape_of(cfg)
    kinds = {_key(layer, "device.activations.layer", "device.activations.dense"): n for layer, n in shape.kinds.items()}
    for layer in shape.kinds:
        _layer_activations(sheet, cfg, dtype, layer)
    if mode == "none":
        names = {f"x{i}": key for i, key in enumerate(kinds)}
        sheet.derive(
            "device.activations", "MB", f"tokens * ({' + '.join(f'n_{x} * {x}' for x in names)})", tokens=tokens,
            **{f"n_{x}": kinds[key] for x, key in names.items()}, **{x: sheet[key] for x, key in names.items()},
        )  # fmt: skip
        return
    # Its input, and of what "selective" keeps, the outputs of products, attention and experts; of a plain MLP that of
    # its first product, too.
    saved = saved_elements(cfg.d_model, shape.main)
    outputs = " + size * (queries + keys + 2 * d + first)" if mode == "selective" else ""
    first = cfg.dense.layers * (shape.main.mlp.matrices - 1) * cfg.dense.d_ff / cfg.n_layers if cfg.dense else 0
    kept = {"size": size, "queries": saved["queries"], "keys": saved["keys"], "first": first}
    sheet.derive(
        "device.activations.kept", "B/token", f"byte/token * ({WIDE} * d{outputs})",
        d=cfg.d_model, **(kept if outputs else {}),
    )  # fmt: skip
    sheet.derive(
        "device.activations", "MB", "tokens * (layers * kept + layer)", "one block at a time is recomputed",
        tokens=tokens, layers=cfg.n_layers, kept=sheet["device.activations.kept"],
        layer=max((sheet[key] for key in kinds), key=float),
    )  # fmt: skip


def _layer_activations(sheet: Sheet, cfg: Config, dtype: Dtype, layer: Layer) -> None:
    saved = saved_elements(cfg.d_model, layer)
    del saved["shared"]  # our models have none
    # A plain MLP is no fused operation: what comes out of the activation, and of a gate's, is saved, too.
    times = 1 if layer.mlp.n_experts else 2
    sheet.derive(
        _key(layer, "device.activations.layer", "device.activations.dense"), "B/token",
        f"byte/token * ({WIDE} * residual + copies * d"
        f" + size * (queries + keys + {times} * routed) + 16 * experts + 4 * heads)",
        copies=4 if dtype == "bf16" else 0, d=cfg.d_model, size=_size(dtype), experts=layer.mlp.n_experts,
        heads=cfg.attention.n_heads, **saved,
    )  # fmt: skip


def _key(layer: Layer, routed: str, dense: str) -> str:
    return routed if layer.mlp.n_experts else dense


def _loss(sheet: Sheet, cfg: Config, dtype: Dtype, tokens: Quantity) -> None:
    """The output layer with its cross-entropy: one chunk of logits and of their softmax, never [tokens, vocabulary];
    the gradients of its input and of its weight, which the backward pass scales into another pair."""
    rows = min(tokens.value, max(1, CHUNK_ELEMENTS // cfg.vocab_size))
    sheet.derive(
        "device.loss", "MB",
        "byte * (rows * vocab * chunk + 2 * 4 * vocab * d) + byte/token * tokens * d * (4 + 2 * size)",
        rows=rows, vocab=cfg.vocab_size, chunk=8 if dtype == "fp32" else 12, d=cfg.d_model, tokens=tokens,
        size=_size(dtype),
    )  # fmt: skip


def _working(sheet: Sheet, cfg: Config, dtype: Dtype, tokens: Quantity) -> None:
    """The backward pass of one block's experts: its input, incoming and outgoing gradients, sorted by expert; the
    activation, and the gradients of activation and pre-activations; the residual's gradient and the norm's."""
    for layer in shape_of(cfg).kinds:
        m = layer.mlp
        sheet.derive(
            _key(layer, "device.working", "device.working.dense"), "MB",
            "byte/token * tokens * (size * k * (3 * d + (gates + 2) * f) + 8 * d)",
            tokens=tokens, size=_size(dtype), k=max(1, m.top_k), d=cfg.d_model, gates=m.matrices - 1, f=m.d_ff,
        )  # fmt: skip


def _size(dtype: Dtype) -> int:
    """Bytes of an element of what products take and give."""
    return NARROW if dtype == "bf16" else WIDE


def _peak(sheet: Sheet, cfg: Config, accumulates: bool) -> None:
    """Three moments compete: the loss, the first block of the backward pass, when all activations are there, and its
    last one, when all gradients are."""
    shape = shape_of(cfg)
    first, last = shape.layers[0], shape.layers[-1]  # of them the backward pass begins with the last
    standing = {name: sheet[f"device.{name}"] for name in ("weights", "copies", "optimizer")}
    gradients, activations = sheet["device.gradients"], sheet["device.activations"]
    working = sheet[_key(last, "device.working", "device.working.dense")]
    earlier = gradients if accumulates else quantity(0, "B")
    note = "gradients of earlier micro-batches stand beside it" if accumulates else ""
    sheet.derive(
        "device.at_loss", "MB", "weights + copies + optimizer + activations + loss + earlier", note,
        **standing, activations=activations, loss=sheet["device.loss"], earlier=earlier,
    )  # fmt: skip
    head = quantity(head_weights(shape), "param")
    sheet.derive(
        "device.at_first_block", "MB",
        "weights + copies + optimizer + activations + working + 4 * byte/param * (block + head) + earlier", note,
        **standing, activations=activations, working=working, block=_block(shape, last), head=head, earlier=earlier,
    )  # fmt: skip
    own = quantity(_block(shape, first).value if sheet["device.copies"].value else 0, "param")
    sheet.derive(
        "device.at_last_block", "MB",
        f"weights + optimizer + {NARROW} * byte/param * own + gradients + tokens * layer + working"
        " + 4 * byte/param * again * block",
        note, **{name: standing[name] for name in ("weights", "optimizer")}, own=own, gradients=gradients,
        tokens=sheet["device.tokens"],
        layer=sheet[_key(first, "device.activations.layer", "device.activations.dense")],
        working=sheet[_key(first, "device.working", "device.working.dense")], again=int(accumulates),
        block=_block(shape, first),
    )  # fmt: skip
    moments = {name: sheet[f"device.{name}"] for name in ("at_loss", "at_first_block", "at_last_block")}
    sheet.derive("device.peak", "MB", f"max({', '.join(moments)})", **moments)


def _block(shape: Shape, layer: Layer) -> Quantity:
    """The matrices of one block."""
    m = layer.mlp
    weights = attention_weights(shape.d_model, layer.attention) + max(1, m.n_experts) * mlp_weights(shape.d_model, m)
    return quantity(weights, "param")


def device_step_work(config: Config | str | Path) -> Sheet:
    """What one optimizer step computes and moves: step.tokens, step.flops and step.bytes.

    The bytes are the least: each micro-batch reads the weights forward and backward and writes their gradients; the
    optimizer reads weights, gradients and moments (AdamW two, Muon one) and writes all but the gradients.
    """
    cfg = config if isinstance(config, Config) else load_config(config)
    t, sheet = cfg.train, Sheet()
    length = t.seq_len or cfg.max_seq_len
    sheet.derive("step.tokens", "token", "token * batch * length", batch=t.batch_size, length=length)
    sheet.derive(
        "step.flops", "TFLOP", f"FLOP/token * ({TRAINING} * forward + again) * tokens",
        "backward is two forwards; again: what checkpointing recomputes",
        forward=flops_per_token(cfg, length), again=_again(cfg, length), tokens=sheet["step.tokens"],
    )  # fmt: skip
    counts = params(cfg)
    sheet.derive(
        "step.bytes", "GB",
        f"byte/param * (params * ({3 * WIDE} * micro_batches + {update_bytes('adamw')})"
        f" - param * muon * {update_bytes('adamw') - update_bytes('muon')})",
        params=quantity(counts.total, "param", key="params.total"),
        muon=counts.block_matrices if t.optimizer == "muon" else 0,
        micro_batches=t.batch_size // (t.micro_batch or t.batch_size),
    )  # fmt: skip
    return sheet


def _again(cfg: Config, length: int) -> int:
    """FLOP per token that activation checkpointing computes again: the experts' first product, or a whole block."""
    shape = shape_of(cfg)
    if cfg.train.activation_checkpointing == "selective":
        return cfg.n_moe_layers * layer_flops(cfg.d_model, shape.main, length).up
    whole = flops_per_token(cfg, length) - head_flops(shape)
    return whole if cfg.train.activation_checkpointing == "full" else 0


def device_step_time(
    config: Config | str | Path, hardware: Hardware, efficiency: Quantity | float, *, dtype: str = "fp32"
) -> Sheet:
    """The time of one optimizer step of a configuration on one device, from the share of its peak that is reached.

    Returns:
        `device_step_work`, and step.time.

    Raises:
        ConfigError: the hardware has no such peak, or a share outside (0, 1].
    """
    cfg = config if isinstance(config, Config) else load_config(config)
    share(efficiency=efficiency)
    sheet = device_step_work(cfg)
    sheet.derive(
        "step.time",
        "s",
        "flops / (peak * share)",
        flops=sheet["step.flops"],
        peak=hardware.peak(dtype),
        share=efficiency,
    )
    return sheet
