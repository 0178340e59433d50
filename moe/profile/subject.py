"""What is profiled: a checkpoint, ours or a Hugging Face directory, and text for it, cut into windows of token ids.

Shape suffixes: B windows, S sequence.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from moe import checkpoint as checkpoints
from moe import hf
from moe.config import TrainConfig
from moe.data import Batch, document_ids, open_data, spaced_windows
from moe.device import pick_dtype
from moe.errors import NotObservable, SubjectError
from moe.evaluate import Window, batches, model_inputs, products, some_windows
from moe.kernels.loss import IGNORE_INDEX
from moe.model import Transformer
from moe.profile.observe import routers
from moe.profile.statistics import RoutingProfile, routing
from moe.profile.trace import record
from moe.tokenizer import Tokenizer

TOKENIZER_FILE = checkpoints.TOKENIZER_FILE


@dataclass(frozen=True)
class Subject:
    """A model ready to be run on token ids."""

    path: Path
    model: nn.Module
    family: str  # the class of the model
    vocab_size: int
    context: int  # tokens
    dtype: torch.dtype = torch.float32  # of the products (autocast): as its training has them on this device


@dataclass(frozen=True)
class Text:
    """Windows of one source after the other, and what a token id looks like."""

    windows: list[Window]
    show: Callable[[int], str]


# ------------------------------------------------------------------------------------------------------------- model


def open_subject(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Subject:
    """Loads a checkpoint of this program, or a directory in Hugging Face's layout (config.json and safetensors).

    Mixtral is read by `moe.hf`; every other family needs the transformers library, which reads local files only.

    Raises:
        CheckpointError: no checkpoint there, or one that cannot be read.
        NotObservable: the model has no router that is known here.
        ImportError: transformers is needed and not installed.
    """
    place = checkpoints.locate(path)
    if not (place / hf.CONFIG_FILE).is_file() or (place / checkpoints.CONFIG_FILE).is_file():
        model = checkpoints.load(place, device=device)
        return _ours(place, model, pick_dtype(model.cfg.train, model.embedding.weight.device))
    if hf.read_config(place).get("model_type") == "mixtral":
        return _ours(place, hf.load(place, device=device))
    model = _through_transformers(place).to(device).eval()
    config = model.config.get_text_config()
    return Subject(place, model, type(model).__name__, config.vocab_size, config.max_position_embeddings)


def _ours(place: Path, model: Transformer, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(place, model.eval(), "Transformer", model.cfg.vocab_size, model.cfg.max_seq_len, dtype)


def _through_transformers(place: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        family = hf.read_config(place).get("model_type")
        raise ImportError(
            f'{place}: a model of type {family!r} needs transformers: pip install "gpt4-moe[hf]"'
        ) from error
    auto: Any = transformers.AutoModelForCausalLM
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(place, **local)
        with torch.device("meta"):  # what is no mixture of experts is refused before its weights are read
            routers(auto.from_config(config))
        model, info = auto.from_pretrained(place, dtype="auto", output_loading_info=True, **local)
    except NotObservable as error:
        raise NotObservable(f"{place}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise hf.HFError(f"{place}: transformers {transformers.__version__} cannot load it: {reason}") from error
    # transformers fills what is missing with random numbers, and only warns.
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise hf.HFError(f"{place}: {len(absent)} tensors are missing or misshapen, {absent[0]} first: copy it again")
    return model


# -------------------------------------------------------------------------------------------------------------- text


def prepared_text(subject: Subject, directory: str | os.PathLike[str], tokens: int, seq_len: int) -> Text:
    """About `tokens` held-out tokens of prepared data, in windows evenly spaced over each source, or held-out
    conversations, a window each.

    Raises:
        DataError: no prepared data, or more ids than the model has.
        SubjectError: the checkpoint comes with another tokenizer.
    """
    data = open_data(Path(directory))
    data.check_compatible(subject.vocab_size)
    own, theirs = subject.path / TOKENIZER_FILE, data.path / TOKENIZER_FILE
    tokenizer = data.tokenizer()
    if own.is_file() and own.read_bytes() != theirs.read_bytes() and _vocabulary(own) != _vocabulary(theirs):
        raise SubjectError(
            f"{directory}: was prepared with another tokenizer than {own}; prepare it with `moe data prepare "
            f"--tokenizer {own}`, or give files of `text`"
        )
    windows = list(some_windows(data, min(seq_len, subject.context), tokens))
    return Text(windows, lambda i: repr(tokenizer.decode([i]))[1:-1])


def text_of_files(subject: Subject, files: Sequence[str], tokens: int, seq_len: int) -> Text:
    """About `tokens` tokens of text files, by the tokenizer.json beside the checkpoint.

    Args:
        files: each PATH or NAME=PATH; files of one name are one source. The default name is the file's.

    Raises:
        SubjectError: no tokenizer, one with more ids than the model, or a file that is not UTF-8 text of two tokens.
    """
    encode, show, eot_id = _tokenizer(subject.path / TOKENIZER_FILE)
    streams: dict[str, list[int]] = {}
    for given in files:
        name, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        try:
            ids = encode(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise SubjectError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
        except OSError as error:
            raise SubjectError(f"{path}: cannot be read ({error.strerror}); `text` takes PATH or NAME=PATH") from None
        stream = streams.setdefault(name or Path(path).stem, [])
        stream += [eot_id] if stream and eot_id is not None else []  # another document
        stream += ids
    for name, ids in streams.items():
        if len(ids) < 2:
            raise SubjectError(f"text {name!r}: has {len(ids)} tokens, at least 2 are needed; give a longer file")
        if max(ids) >= subject.vocab_size:
            raise SubjectError(
                f"{subject.path / TOKENIZER_FILE}: gives id {max(ids)}, but the model's vocab_size is "
                f"{subject.vocab_size:,}: it is another model's tokenizer"
            )
    rest = {name: np.array(ids[1:]) for name, ids in streams.items()}
    first = {name: ids[0] for name, ids in streams.items()}
    found = []
    for name, inputs, targets in spaced_windows(rest, first, min(seq_len, subject.context), tokens):
        documents = None if eot_id is None else document_ids(inputs[None], eot_id)[0]
        found.append(Window(name, inputs, targets, np.ones(len(targets), dtype=bool), documents))
    return Text(found, show)


def _tokenizer(file: Path) -> tuple[Callable[[str], list[int]], Callable[[int], str], int | None]:
    """How to encode, special tokens at the beginning included, how to show a token, and our end-of-text."""
    if not file.is_file():
        raise SubjectError(
            f"{file}: no such file, and text needs the checkpoint's own tokenizer; copy it there (transformers writes "
            "one: AutoTokenizer.from_pretrained(...).save_pretrained(...)), or give `data`"
        )
    content = _json(file)
    if (file.parent / checkpoints.CONFIG_FILE).is_file() or "moe_tokenizer" in content:
        ours = Tokenizer.load(file)
        return ours.encode, lambda i: repr(ours.decode([i]))[1:-1], ours.eot_id
    try:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except ImportError as error:
        raise ImportError("reading tokenizers needs the tokenizers library: pip install tokenizers") from error
    except Exception as error:  # the library raises bare Exception
        raise SubjectError(f"{file}: the tokenizers library cannot read it ({error}); copy it again") from None
    backend.no_truncation()
    backend.no_padding()
    spaces = "▁" in json.dumps(content.get("decoder"), ensure_ascii=False)  # SentencePiece's way of writing a space

    def show(token_id: int) -> str:
        if not spaces:
            return repr(backend.decode([token_id], skip_special_tokens=False))[1:-1]
        return repr((backend.id_to_token(token_id) or "").replace("▁", " "))[1:-1]

    return lambda text: backend.encode(text).ids, show, None


def _vocabulary(file: Path) -> dict[str, Any]:
    """What decides which ids a text gets."""
    content = _json(file)
    if "moe_tokenizer" in content:
        return content
    merges = [" ".join(m) if isinstance(m, list) else m for m in content.get("model", {}).get("merges") or []]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    return {"vocab": {**content.get("model", {}).get("vocab", {}), **added}, "merges": merges}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise SubjectError(f"{file}: not complete JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise SubjectError(f"{file}: JSON, but not a tokenizer; copy it again")
    return content


# ----------------------------------------------------------------------------------------------------------- running


@torch.no_grad()
def profile_routing(
    subject: Subject, windows: Iterable[Window], batch: int, trace: str | os.PathLike[str] | None = None
) -> RoutingProfile:
    """Runs the windows, `batch` at a time, and profiles each source apart; records the routing where `trace` says."""
    recording = record(subject.model, trace) if trace is not None else contextlib.nullcontext()
    with recording, routing(subject.model, subject.vocab_size) as p:
        for p.source, part in batches(windows, batch):
            _run(subject, part, "targets")  # the logits are never whole
    return p


@torch.no_grad()
def log_probabilities(subject: Subject, windows: Iterable[Window], batch: int) -> dict[str, Tensor]:
    """The natural logarithm of the probability of every scored target, per source, in order: float32 [tokens]."""
    found: dict[str, list[Tensor]] = {}
    for source, part in batches(windows, batch):
        logits_BSV = _run(subject, part, "logits")
        for logits_SV, targets_S in zip(logits_BSV, torch.from_numpy(part.targets).to(logits_BSV.device), strict=True):
            at = (targets_S != IGNORE_INDEX).nonzero().squeeze(1)
            log_p_S = logits_SV[at].float().log_softmax(-1).gather(1, targets_S[at, None]).squeeze(1)
            found.setdefault(source, []).append(log_p_S.cpu())
    return {source: torch.cat(parts) for source, parts in found.items()}


def _run(subject: Subject, batch: Batch, want: Literal["logits", "targets"]) -> Any:
    """A forward pass, ours as its training had it -> its logits [B, S, V], or with "targets" none of use."""
    model, device = subject.model, next(subject.model.parameters()).device
    if isinstance(model, Transformer):
        inputs = model_inputs(model.cfg.train, batch, device)
        if want == "logits":
            inputs["targets_BS"] = None
        with products(subject.dtype, device):
            return model(**inputs).logits_BSV
    inputs = model_inputs(TrainConfig(), batch, device)
    keep = {"logits_to_keep": 1} if want == "targets" else {}
    mask = inputs["mask_BS"]
    mask = None if mask is None else mask.to(device)
    return model(input_ids=inputs["tokens_BS"], attention_mask=mask, use_cache=False, **keep).logits


def equal_windows(subject: Subject, windows: Iterable[Window], batch: int) -> Tensor:
    """Up to `batch` windows of the commonest length with the target after each, int64 [B, S + 1], on the device."""
    lengths = Counter(len(inputs) for _, inputs, *_ in windows)
    length = lengths.most_common(1)[0][0]
    rows = [np.append(inputs, targets[-1]) for _, inputs, targets, *_ in windows if len(inputs) == length]
    chosen = np.linspace(0, len(rows) - 1, min(batch, len(rows))).astype(int)
    return torch.from_numpy(np.stack([rows[i] for i in chosen])).to(next(subject.model.parameters()).device)
