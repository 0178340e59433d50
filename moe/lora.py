"""LoRA: fine-tuning through low-rank updates of frozen weights (Hu et al. 2021, arXiv:2106.09685).

`add` puts adapters on a model's attention projections and on every expert's matrices: W becomes W + (alpha / rank) B A.
A is random and B zero, so training starts at the model itself. Names of the weights stay, names of adapters contain
`lora_`. `merged` gives a plain model with the updates in its weights, `save_adapter` writes the adapters alone, a few
percent of the model, and `load_adapter` puts them on top of the model that they were trained on.

Shape suffixes: I in, O out, L rank; E, G, F, D as in experts.py.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from moe.checkpoint import cannot_write, put_tensors, stored_state, with_current_names
from moe.errors import CheckpointError, ConfigError
from moe.experts import Experts
from moe.io.files import write_whole
from moe.io.tensorfiles import check_plain, check_tensors
from moe.kernels.experts import lora as kernel
from moe.layers import Linear, made_by_init_weights, untouched
from moe.model import Transformer, drawn_as, generator_for

TARGETS = ("attention", "experts")
ADAPTER_FILE = "adapter.safetensors"
FORMAT = "moe-lora"
_PROJECTIONS = ("wq", "wk", "wv", "wo")


@dataclass(frozen=True)
class LoraConfig:
    """`rank` of the updates, their scale `alpha` / `rank`, and what gets them: of "attention" and "experts" (every
    layer's MLP).

    Raises:
        ConfigError: a rank or alpha that cannot be, no target or an unknown one.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 2**16:
            raise ConfigError(f"lora.rank = {self.rank}: must be 1 or more, and at most {2**16:,}; 8 or 16 is common")
        if not 0 < self.alpha <= 1e9:
            raise ConfigError(
                f"lora.alpha = {self.alpha}: must be greater than 0, and at most 1e9; twice the rank is common"
            )
        if not self.targets or any(t not in TARGETS for t in self.targets):
            raise ConfigError(f"lora.targets = {list(self.targets)}: name one or both of {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


class LoraLinear(nn.Module):
    """y = W x + scale * B (A x), with W [O, I] frozen."""

    reset_parameters = made_by_init_weights

    def __init__(self, weight_OI: nn.Parameter, cfg: LoraConfig) -> None:
        super().__init__()
        (n_out, n_in), like = weight_OI.shape, {"dtype": weight_OI.dtype, "device": weight_OI.device}
        self.scale = cfg.scale
        self.weight = nn.Parameter(weight_OI.detach(), requires_grad=False)
        self.lora_a_LI = nn.Parameter(torch.zeros(cfg.rank, n_in, **like))
        self.lora_b_OL = nn.Parameter(torch.zeros(n_out, cfg.rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_a_LI), self.lora_b_OL)

    def merged(self) -> Tensor:
        """W + scale * B A."""
        return torch.addmm(self.weight, self.lora_b_OL, self.lora_a_LI, alpha=self.scale)


class LoraExperts(nn.Module):
    """The expert MLPs with adapters on every expert's w_in and w_out, which are frozen."""

    reset_parameters = made_by_init_weights

    def __init__(self, experts: Experts, cfg: LoraConfig) -> None:
        super().__init__()
        E, G, width, D = experts.w_in_EGFD.shape
        like: dict[str, Any] = {"dtype": experts.w_in_EGFD.dtype, "device": experts.w_in_EGFD.device}
        self.scale = cfg.scale
        self.activation = experts.activation
        self.w_in_EGFD = nn.Parameter(experts.w_in_EGFD.detach(), requires_grad=False)
        self.w_out_EDF = nn.Parameter(experts.w_out_EDF.detach(), requires_grad=False)
        self.lora_a_in_ELD = nn.Parameter(torch.zeros(E, cfg.rank, D, **like))
        self.lora_b_in_EGFL = nn.Parameter(torch.zeros(E, G, width, cfg.rank, **like))
        self.lora_a_out_ELF = nn.Parameter(torch.zeros(E, cfg.rank, width, **like))
        self.lora_b_out_EDL = nn.Parameter(torch.zeros(E, D, cfg.rank, **like))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """As `Experts.forward`."""
        adapters = kernel.Adapters(self.lora_a_in_ELD, self.lora_b_in_EGFL, self.lora_a_out_ELF, self.lora_b_out_EDL)
        weights = self.w_in_EGFD, self.w_out_EDF
        return kernel.expert_mlp(x_TD, *weights, adapters, self.scale, weights_TK, ids_TK, self.activation)

    def merged(self) -> dict[str, Tensor]:
        """The experts' weights with their updates, by name."""
        return {
            "w_in_EGFD": kernel.merge(self.w_in_EGFD, self.lora_a_in_ELD, self.lora_b_in_EGFL, self.scale),
            "w_out_EDF": kernel.merge(self.w_out_EDF, self.lora_a_out_ELF, self.lora_b_out_EDL, self.scale),
        }


# ----------------------------------------------------------------------------------------------- adding and merging


def add(model: Transformer, cfg: LoraConfig, seed: int = 0) -> None:
    """Freezes the model and puts adapters on it, in place; its outputs stay what they are.

    A is uniform in +- 1 / sqrt(fan-in), each matrix drawn from a generator seeded by (seed, name, expert); B is zero.
    On the meta device there is nothing to draw: load weights into the model (`checkpoint.load_weights`).

    Raises:
        ValueError: the model has adapters already, or a module that would get them is not ours or is patched (a
            quantised weight, a forward of its own, hooks): what takes its place would undo that.
    """
    if is_added(model):
        raise ValueError("the model has adapters already: merge them first (moe.lora.merged)")
    targets = _targets(model, cfg)
    for name, module in targets.items():
        kind = Experts if name.endswith(".experts") else Linear
        if not untouched(module, kind):
            raise ValueError(
                f"{name} is no plain {kind.__name__} (it is a {type(module).__name__}, or has hooks, a forward or a "
                "kind of weight of its own), and adapters would silently undo that: add them to an unchanged model"
            )
    model.requires_grad_(False)
    for name, module in targets.items():
        adapted = LoraExperts(module, cfg) if isinstance(module, Experts) else LoraLinear(module.weight, cfg)  # type: ignore[arg-type]
        model.set_submodule(name, adapted)
    for block in model.blocks:
        if "experts" in cfg.targets and block.moe is not None:
            block.moe.router.bias_update_rate = 0.0  # type: ignore[union-attr]  # it, too, belongs to the frozen model
    for name, parameter in adapters(model).items():
        if ".lora_a_" in name and not parameter.is_meta:
            bound = 1 / math.sqrt(parameter.shape[-1])
            for e, part in enumerate(parameter.detach() if parameter.ndim == 3 else [parameter.detach()]):
                part.uniform_(-bound, bound, generator=generator_for(parameter.device, seed, drawn_as(name), e))


def _targets(model: Transformer, cfg: LoraConfig) -> dict[str, nn.Module]:
    """What gets adapters, by name."""
    names = []
    for i, block in enumerate(model.blocks):
        if "attention" in cfg.targets:
            names += [f"blocks.{i}.attention.{leaf}" for leaf in _PROJECTIONS]
        if "experts" in cfg.targets:
            mlp = [f"blocks.{i}.mlp.{leaf}" for leaf in ("w_in", "w_out")]
            names += mlp if block.moe is None else [f"blocks.{i}.moe.experts"]
    return {name: model.get_submodule(name) for name in names}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def is_added(model: nn.Module) -> bool:
    """Whether the model has adapters."""
    return bool(adapters(model))


@torch.no_grad()
def merged(model: Transformer) -> Transformer:
    """A plain model with the updates in its weights; weights without adapters are shared, the given model is kept."""
    state = {name: tensor for name, tensor in stored_state(model).items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.weight"] = module.merged()
        elif isinstance(module, LoraExperts):
            state |= {f"{name}.{leaf}": tensor for leaf, tensor in module.merged().items()}
    with torch.device("meta"):
        plain = Transformer(model.cfg)
    put_tensors(plain, {name: tensor.detach() for name, tensor in state.items()})
    return plain


# ------------------------------------------------------------------------------------------------ adapters on disk


def save_adapter(model: Transformer, cfg: LoraConfig, file: str | os.PathLike[str]) -> None:
    """Writes the adapters alone, as safetensors; the settings and a mark of the base model are in its metadata.

    Raises:
        CheckpointError: the model has no adapters, they are sharded, or the file cannot be written.
    """
    if not is_added(model):
        raise CheckpointError("the model has no adapters to save: add some first (moe.lora.add)")
    check_plain(adapters(model))
    tensors = {name: p.detach().cpu().contiguous() for name, p in adapters(model).items()}
    metadata = {"format": FORMAT, "lora": json.dumps(asdict(cfg)), "base": _base_mark(model), "name": model.cfg.name}
    try:
        write_whole(Path(file), to_safetensors(tensors, metadata))
    except OSError as error:
        raise CheckpointError(cannot_write(file, error)) from error


def load_adapter(model: Transformer, file: str | os.PathLike[str]) -> LoraConfig:
    """Puts saved adapters on the plain model that they were trained on, in place; returns their settings.

    Args:
        file: what `save_adapter` wrote, or a directory with an adapter.safetensors.

    Raises:
        CheckpointError: no such file, not adapters, of another model. The model is then as it was.
    """
    file = Path(file) / ADAPTER_FILE if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give the {ADAPTER_FILE} that moe finetune --lora wrote")
    try:
        with safe_open(file, framework="pt", device="cpu") as source:
            metadata = source.metadata() or {}
            tensors = with_current_names({name: source.get_tensor(name) for name in source.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): copy it again") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{file} holds no adapters of this program: give one that moe finetune --lora wrote")
    settings = json.loads(metadata["lora"])
    cfg = LoraConfig(settings["rank"], settings["alpha"], tuple(settings["targets"]))
    if is_added(model):
        raise CheckpointError(f"{file} cannot be loaded: the model has adapters already, merge them first")
    with torch.device("meta"):
        trial = Transformer(model.cfg)
    add(trial, cfg)
    check_tensors(file, tensors, {name: tuple(p.shape) for name, p in adapters(trial).items()})
    if metadata.get("base") != _base_mark(model):
        raise CheckpointError(
            f"{file} was trained on other weights than these (a {metadata.get('name')}, before any fine-tuning): load "
            "it on the checkpoint that moe finetune was given"
        )
    add(model, cfg)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            parameter.copy_(tensors[name])
    return cfg


def _base_mark(model: Transformer) -> str:
    """A sha256 of some of the frozen weights: all routers, a projection of the first layer, an expert of the first with
    experts.

    They are rounded to bfloat16, so that a model loaded in that dtype has the same mark.
    """
    digest = hashlib.sha256()
    layers: list[Any] = [block.moe for block in model.blocks if block.moe is not None]
    chosen: list[Tensor] = [moe.router.weight for moe in layers]
    chosen += [model.blocks[0].attention.wq.weight, layers[0].experts.w_in_EGFD[0]]  # type: ignore[union-attr]
    for tensor in chosen:
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())  # type: ignore[union-attr]
    return digest.hexdigest()
