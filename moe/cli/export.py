"""`moe export`: a checkpoint in another format, whole or not at all.

As in main.py, the command imports what it needs when it runs.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    import torch

    from moe.config import Config
    from moe.model import Transformer
    from moe.tokenizer import Tokenizer


def export(
    checkpoint: Positional[Path],
    out: Positional[Path],
    /,
    *,
    format: Literal["hf", "moe"] = "hf",
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep",
    adapter: Path | None = None,
) -> int:
    """Write a model in another format: for Hugging Face's libraries (a Mixtral), or a Mixtral for this program.

    Tokenizer and chat template come along. Logits stay equal, but for the rounding of another dtype.

    Args:
        checkpoint: A run of moe train or moe finetune, a checkpoint of this program, or the directory of a Mixtral.
        out: A new or an empty directory.
        format: hf is what transformers and vLLM read, moe what this program reads.
        dtype: Of the weights; keep leaves them as they are.
        adapter: RUN/adapter.safetensors of a LoRA fine-tune, merged into the checkpoint that it was given.
    """
    from moe.errors import CheckpointError
    from moe.io.files import is_taken, locked

    if not out.exists() or out.is_dir():
        with locked(out):
            if not is_taken(out):
                return _export(checkpoint, out, format, dtype, adapter)
    raise CheckpointError(f"{out} exists and is not empty: choose a new or an empty directory")


def _export(checkpoint: Path, out: Path, format: str, dtype: str, adapter: Path | None) -> int:
    from moe import checkpoint as checkpoints
    from moe import hf, lora

    place = checkpoints.locate(checkpoint)
    foreign = (place / hf.CONFIG_FILE).is_file() and not (place / checkpoints.CONFIG_FILE).is_file()
    cfg = hf.config_from_hf(hf.read_config(place)) if foreign else checkpoints.load_config_of(place)
    if format == "hf":  # what cannot be written is said before the weights are read
        hf.config_to_hf(cfg)
    tokenizer = _tokenizer(place, cfg, foreign)
    if format == "hf" and tokenizer is not None and not hasattr(tokenizer._backend, "to_str"):
        name = f"the tokenizer {tokenizer.name} is in no file that transformers reads, so none is written"
        print(f"notice: {name}; take a copy of it made for Hugging Face", file=sys.stderr)
        tokenizer = None
    model = (hf.load if foreign else checkpoints.load)(place, dtype=_dtype(dtype) if adapter is None else None)
    if adapter is not None:
        lora.load_adapter(model, adapter)
        model = lora.merged(model)
        model = model if dtype == "keep" else model.to(_dtype(dtype))
    (hf.save if format == "hf" else checkpoints.save)(model, out, tokenizer=tokenizer)
    print(f"{out}: {_summary(model, tokenizer, format)}")
    return 0


def _dtype(name: str) -> "torch.dtype | None":
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def _tokenizer(place: Path, cfg: "Config", foreign: bool) -> "Tokenizer | None":
    """The tokenizer beside the weights, or None with a notice why it stays behind."""
    from moe import checkpoint as checkpoints
    from moe.errors import CheckpointError

    if not (place / checkpoints.TOKENIZER_FILE).is_file():
        print(f"notice: {place} has no {checkpoints.TOKENIZER_FILE}, so none is written", file=sys.stderr)
        return None
    try:
        tokenizer = checkpoints.load_tokenizer(place)
        checkpoints.check_vocabulary(cfg, tokenizer)
        return tokenizer
    except CheckpointError as error:
        if not foreign:
            raise
        print(f"notice: the tokenizer stays behind, and no text can be generated without one: {error}", file=sys.stderr)
        return None


def _summary(model: "Transformer", tokenizer: "Tokenizer | None", format: str) -> str:
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    parts = [f"{sum(p.numel() for p in model.parameters()):,} parameters in {dtype}"]
    parts.append("a Mixtral for transformers" if format == "hf" else "a checkpoint for moe.load")
    parts.append("no tokenizer" if tokenizer is None else f"tokenizer {tokenizer.name}")
    if tokenizer is not None and tokenizer.chat_template is not None:
        parts.append("its chat template")
    return ", ".join(parts)
