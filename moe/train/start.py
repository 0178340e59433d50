"""What a run begins with: its directory, its windows, and its model: new, another run's, or from a checkpoint."""

from contextlib import ExitStack
from pathlib import Path

import torch

from moe import checkpoint
from moe import lora as loras
from moe.config import Config
from moe.data import ConversationData, ConversationStream, Mixture, Stream, TokenData
from moe.errors import ConfigError, TrainError
from moe.io.files import is_taken, locked
from moe.lora import LoraConfig
from moe.model import Transformer
from moe.train import state


def enter(run_dir: Path, resume: str, start_from: str | Path | None, held: ExitStack) -> Path | None:
    """Makes the run's directory, for this process alone until `held` is closed; the checkpoint to resume from, if any.

    "never" moves an older run aside.

    Raises:
        InUseError: another process trains there.
        TrainError: something other than a run is there, or it holds the weights to begin with.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise TrainError(f"run directory {run_dir} is a file: choose another `run_dir`")
    if is_taken(run_dir):
        if not (run_dir / checkpoint.CONFIG_FILE).is_file():
            raise TrainError(f"run directory {run_dir} exists and is not a run: choose a new or an empty `run_dir`")
        if resume == "never":
            if start_from is not None and Path(start_from).resolve().is_relative_to(run_dir.resolve()):
                raise TrainError(f"{start_from} is in {run_dir}, which would be moved aside: choose another `run_dir`")
            with locked(run_dir):
                n = 1
                while (aside := run_dir.with_name(f"{run_dir.name}-old-{n}")).exists():
                    n += 1
                run_dir.rename(aside)
    held.enter_context(locked(run_dir))
    state.remove_unfinished(run_dir)
    return state.latest(run_dir)


# What a later stage of a recipe may change in a model.
OF_A_STAGE = ("name", "max_seq_len", "attention.rope.", "router.", "train.")


def open_stream(cfg: Config, data: TokenData | ConversationData) -> Stream:
    """The windows of prepared documents or conversations, in the order of `cfg.train`."""
    t = cfg.train
    kind = ConversationStream if isinstance(data, ConversationData) else Mixture
    return kind(data, t.seq_len or cfg.max_seq_len, t.seed, t.epochs, documents=t.document_mask)  # type: ignore[arg-type]


def check_start(cfg: Config, data: TokenData | ConversationData, start_from: Path) -> None:
    """Raises ConfigError where the weights of `start_from` are not those of a model of `cfg` for these tokens."""
    before = checkpoint.load_config_of(start_from)
    changed = [line for line in state.differences(before.to_toml(), cfg) if not line.startswith(OF_A_STAGE)]
    if changed:
        raise ConfigError(f"{start_from} has another shape: {', '.join(changed)}; set these as they were there")
    checkpoint.load_tokenizer(start_from)  # there must be one
    check_tokenizer(start_from, data)


def check_tokenizer(trained: Path, data: TokenData | ConversationData) -> None:
    """Raises ConfigError where the checkpoint `trained` has another tokenizer than the data; it may have none."""
    own = checkpoint.locate(trained) / checkpoint.TOKENIZER_FILE
    if own.is_file() and checkpoint.load_tokenizer(trained).fingerprint != data.tokenizer().fingerprint:
        kind = "instructions" if isinstance(data, ConversationData) else "prepare"
        raise ConfigError(
            f"{trained} was trained with another tokenizer than {data.path} was prepared with, so its ids mean other "
            f"text: prepare the data with that one, `moe data {kind} --tokenizer {own}`"
        )


def open_model(
    cfg: Config, device: torch.device, found: Path | None, start_from: str | Path | None, lora: LoraConfig | None
) -> Transformer:
    """The model: from the run's checkpoint `found`, else with the weights of `start_from`, else new.

    With `lora` it is frozen and has adapters, which `found` holds, too.
    """
    weights = found or start_from
    if weights is None:
        with device:
            model = Transformer(cfg, cfg.train.seed)
    else:
        with torch.device("meta"):
            model = Transformer(cfg)
        if lora is not None and found is not None:
            loras.add(model, lora)
        # A resumed run takes the dtypes it had; another model's may be narrower than training wants.
        checkpoint.load_weights(model, weights, device=device, dtype=None if found else torch.float32)
    if lora is not None and found is None:
        loras.add(model, lora, cfg.train.seed)
    model.activation_checkpointing = cfg.train.activation_checkpointing
    return model
