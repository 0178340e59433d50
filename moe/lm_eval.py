"""The adapter to lm-eval, EleutherAI's evaluation harness: its model "moe".

`moe eval CHECKPOINT --tasks TASK.yaml` uses it, and so does `lm_eval --model moe --model_args checkpoint=DIR` where
lm-eval reads the entry points of the group `lm_eval.models`, which it does after release 0.4.13. Up to that one
`python -m moe.lm_eval` is lm-eval's command line with this model in it.

Shape suffixes: B sequences, S positions, N selected positions, D model width, V vocabulary.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe import checkpoint as checkpoints
from moe.data import Batch, document_ids
from moe.device import pick_device, pick_dtype
from moe.errors import ConfigError, DataError
from moe.evaluate import model_inputs
from moe.kernels.loss import IGNORE_INDEX
from moe.layers import Head, untouched
from moe.model import Transformer
from moe.serve.blocks import blocks_for
from moe.serve.engine import Engine, check_served
from moe.serve.output import Delta
from moe.serve.request import SamplingParams
from moe.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise ImportError(f'tasks need lm-eval: pip install "gpt4-moe[eval]" ({error})') from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_BATCH = 16
_CHUNK_ELEMENTS = 2**22  # logits that exist at once
_GENERATION_KEYS = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}

# ((context, continuation) or None, ids of the context, ids of the continuation)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class MoeLM(TemplateLM):
    """A checkpoint of this program for lm-eval.

    Args:
        checkpoint: a directory that `moe.save` or `moe train` wrote, with a tokenizer; or give `model` and `tokenizer`.
        batch_size: sequences at a time; "auto" is 16.
        device: None takes CUDA where there is one; so does "cuda:0", lm-eval's default, where there is none.
        max_length: the longest context; None: all that the model has.

    Raises:
        ConfigError: a setting out of range, both or neither of `checkpoint` and `model`.
        CheckpointError: `checkpoint` cannot be read, or has no tokenizer.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        *,
        model: Transformer | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if (checkpoint is None) == (model is None) or (model is None) != (tokenizer is None):
            raise ConfigError("model_args: give checkpoint=DIR, or a model together with its tokenizer")
        if model is None:
            assert checkpoint is not None
            model = checkpoints.load(checkpoint, device=_device(device))
            tokenizer = checkpoints.load_tokenizer(checkpoint)
        assert tokenizer is not None
        longest = model.cfg.max_seq_len
        self.max_length = _whole("max_length", max_length if max_length is not None else longest, longest)
        self.batch_size = DEFAULT_BATCH if batch_size in (None, "auto") else _whole("batch_size", batch_size, 2**20)
        self.model, self.vocabulary = model.eval(), tokenizer
        self._device = model.embedding.weight.device
        self._dtype = pick_dtype(model.cfg.train, self._device)
        self._draws = 0

    @property
    def eot_token_id(self) -> int:
        """The id of end-of-text, which also stands before a text without a context."""
        return self.vocabulary.eot_id

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm-eval's cache of requests."""
        return f"{self.vocabulary.name}-{self.vocabulary.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text. None is added; special tokens written out in it are ordinary characters."""
        return self.vocabulary.encode(string)

    # ------------------------------------------------------------------------------------------------- likelihoods

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation of a context.

        Raises:
            DataError: a continuation that is empty, or longer than the context of the model.
        """
        texts: list[tuple[str, str]] = [request.args for request in requests]  # type: ignore[misc]
        pairs: list[Request] = [(pair, *self._encode_pair(*pair)) for pair in texts]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The ids of a context and of what follows it, at least one of each.

        As lm-eval has it, spaces at the context's end go to the continuation, both are encoded together, and the
        context's share is as many tokens as it has alone. Where these are not the beginning of the whole, because the
        tokenizer joins across the boundary ("ans" + "wer" = "answer"), part of the continuation, or all of it, would be
        given away unscored: each is then encoded by itself. Before an empty context stands end-of-text.
        """
        alone = context.rstrip()
        continuation = context[len(alone) :] + continuation
        ids, whole = self.tok_encode(alone), self.tok_encode(alone + continuation)
        joined = whole[: len(ids)] != ids or len(whole) == len(ids)
        return ids or [self.eot_token_id], self.tok_encode(continuation) if joined else whole[len(ids) :]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        A context too long for the model loses its beginning. Requests with the same tokens run once.

        Raises:
            DataError: a continuation that is empty, or longer than the context of the model.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        wanted: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        cut = 0
        for i, (texts, context, continuation) in enumerate(requests):
            if not context or not continuation:
                after = f" after {texts[0][-40:]!r}" if texts else ""
                raise DataError(
                    f"request {i}: an empty {'continuation' if context else 'context'}{after} has no likelihood to "
                    "compare, and would count as certain; give it at least one token"
                )
            if len(continuation) > self.max_length:
                raise DataError(
                    f"request {i}: a continuation of {len(continuation)} tokens, but max_length = {self.max_length}: "
                    "score it as loglikelihood_rolling, or use a model with a longer context"
                )
            whole = context + continuation
            cut += len(whole) > self.max_length + 1
            wanted[tuple(whole[-(self.max_length + 1) : -1])].append((i, continuation))
        if cut:
            logging.getLogger(__name__).warning(
                "%d of %d requests are longer than max_length = %d: the beginning of their context is left out",
                *(cut, len(requests), self.max_length),
            )
        # The longest first: memory runs out at once or never, and times left are overestimated rather than under.
        order = sorted(wanted, key=lambda ids: (-len(ids), ids))
        with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for batch in _batches(order, self.batch_size):
                targets = [wanted[ids] for ids in batch]
                for i, answer in self._score(batch, targets):
                    found[i] = answer
                    bar.update()
                    texts = requests[i][0]
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    @torch.no_grad()
    def _score(
        self, inputs: Sequence[tuple[int, ...]], targets: Sequence[Sequence[tuple[int, list[int]]]]
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """(number of the request, answer) for the requests that end each of the inputs."""
        text_BS = np.arange(max(map(len, inputs))) < np.array([[len(ids)] for ids in inputs])
        tokens_BS = np.full(text_BS.shape, self.eot_token_id, dtype=np.int64)
        tokens_BS[text_BS] = np.concatenate(inputs)
        documents_BS = document_ids(tokens_BS, self.eot_token_id)
        x_BSD = self._hidden(Batch(tokens_BS, np.full_like(tokens_BS, IGNORE_INDEX), documents_BS, text_BS))
        for x_SD, ids, ends in zip(x_BSD, inputs, targets, strict=True):
            most = max(len(continuation) for _, continuation in ends)
            x_ND = x_SD[len(ids) - most : len(ids)]
            # At one position different requests may want different tokens, but the prediction is the same.
            table = torch.tensor([[0] * (most - len(c)) + c for _, c in ends], device=self._device)
            logp, greedy = self._log_probabilities(x_ND, table.t())
            for column, (i, continuation) in enumerate(ends):
                rows = slice(most - len(continuation), most)
                yield i, (float(logp[rows, column].sum()), bool(greedy[rows, column].all()))

    def _hidden(self, batch: Batch) -> Tensor:
        """What the output layer gets, [B, S, D], of the model called as in training, its padding masked.

        All logits at once would be S x V; only some are wanted. Of a model whose output is not exactly its own head's,
        those logits after all.
        """
        inputs = model_inputs(self.model.cfg.train, batch, self._device)
        inputs["targets_BS"] = None
        if not self._ours():
            with self._autocast():
                logits_BSV = self.model(**inputs).logits_BSV
            assert logits_BSV is not None
            return logits_BSV
        seen: list[Tensor] = []

        def keep(module: torch.nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            seen.append(arguments[0])
            return (arguments[0][:, :0],)

        hook = self.model.head.register_forward_pre_hook(keep)
        try:
            with self._autocast():
                self.model(**inputs)
        finally:
            hook.remove()
        return seen[0]

    def _ours(self) -> bool:
        return untouched(self.model, Transformer) and untouched(self.model.head, Head)

    def _log_probabilities(self, x_ND: Tensor, wanted_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens `wanted_NC`: log-probabilities, float64, and whether each is the likeliest, bool; [N, C]."""
        logp, greedy = [], []
        size = max(1, _CHUNK_ELEMENTS // self.model.cfg.vocab_size)
        for x_D, wanted in zip(x_ND.split(size), wanted_NC.split(size), strict=True):
            with self._autocast():
                logits_NV = (self.model.head(x_D) if self._ours() else x_D).double()
            logp.append(logits_NV.log_softmax(-1).gather(1, wanted))
            greedy.append(logits_NV.argmax(-1, keepdim=True) == wanted)
        return torch.cat(logp), torch.cat(greedy)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32)

    def loglikelihood_rolling(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text from end-of-text on, in nats, every token scored once.

        In windows of `max_length` that do not overlap, but for the last one: lm-eval's convention.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[Request] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.eot_token_id, self.max_length, context_len=1):
                context, continuation = make_disjoint_window(pair)
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        answers = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (logp, _) in zip(owners, answers, strict=True):
            totals[i] += logp
        for request, sum_ in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, sum_)
        return totals

    # -------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to a stop string, end-of-text or `max_gen_toks` tokens.

        `batch_size` of them run together, whatever their lengths and settings. A context that leaves no room for
        `max_gen_toks` loses its beginning. Equal contexts of different requests get different draws.

        Raises:
            ConfigError: a setting that this model does not have, or more tokens to generate than it has positions.
            ServeError: the model's pass failed.
        """
        prompts, settings = [], []
        for request in requests:
            context, given = request.arguments  # type: ignore[misc]
            self._draws += 1
            params = _generation(given, self.max_gen_toks, self.max_length, seed=self._draws)
            room = self.max_length - (params.max_tokens or 0)
            prompts.append((self.tok_encode(context) or [self.eot_token_id])[-room:])
            settings.append(params)
        found = [""] * len(requests)
        longest = max((len(p) + (s.max_tokens or 0) for p, s in zip(prompts, settings, strict=True)), default=1)
        together = max(1, min(self.batch_size, len(requests)))
        engine = Engine(self.model, self.vocabulary, num_blocks=together * blocks_for(longest), max_running=together)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generation") as bar:

            def take(i: int, delta: Delta) -> None:
                if delta.output is not None:
                    check_served([delta.output])
                    found[i] = delta.output.text
                    self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
                    bar.update()

            # The longest first: memory runs out at once or never.
            for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
                engine.add(prompts[i], settings[i], listener=lambda delta, i=i: take(i, delta))
            while not engine.idle:
                engine.step()
        return found


register_model("moe")(MoeLM)


def _device(name: str | None) -> torch.device:
    if name is not None and name.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("device %s: no CUDA here, the CPU is used", name)
        return torch.device("cpu")
    return pick_device(name)


def _whole(name: str, value: int | str | None, high: int) -> int:
    """A number of the command line, from 1 to `high`."""
    if not str(value).isdecimal() or not 1 <= int(str(value)) <= high:
        raise ConfigError(f"{name} = {value!r}: must be a whole number from 1 to {high}")
    return int(str(value))


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _generation(given: dict[str, Any], default: int, max_length: int, seed: int) -> SamplingParams:
    """A task's generation_kwargs."""
    from lm_eval.models.utils import normalize_gen_kwargs

    settings = dict(normalize_gen_kwargs(given, default))
    unknown = sorted(settings.keys() - _GENERATION_KEYS)
    if unknown:
        known = ", ".join(sorted(_GENERATION_KEYS))
        raise ConfigError(f"generation_kwargs: {', '.join(unknown)} unknown; there are {known}")
    n_tokens: Any = settings["max_gen_toks"]
    if not 1 <= n_tokens < max_length:
        raise ConfigError(
            f"max_gen_toks = {n_tokens}: must be at least 1 and leave room for a context within max_length = "
            f"{max_length}; set it in the task's generation_kwargs"
        )
    given_stop: Any = settings["until"]
    stop = [s for s in given_stop if s is not None]
    if wrong := [s for s in stop if not s or not isinstance(s, str)]:
        raise ConfigError(f"stop = {wrong[0]!r}: must be a string of at least one character; leave it out of `until`")
    sampling: dict[str, Any] = {"temperature": 0.0}
    if settings["do_sample"]:
        sampling = {key: settings[key] for key in ("temperature", "top_k", "top_p") if key in settings}
    return SamplingParams(max_tokens=n_tokens, stop=stop, seed=seed, **sampling)


# ------------------------------------------------------------------------------------------------------------ tasks


def run_tasks(lm: MoeLM, tasks: Sequence[str], *, limit: int | None = None) -> tuple[dict[str, Any], str]:
    """Runs tasks of lm-eval: (metrics by task, the table that lm-eval prints).

    Args:
        tasks: YAML files (relative paths inside them start at the working directory), or names that lm-eval knows.
        limit: only so many documents of each.

    Raises:
        ConfigError: no such file or name.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import make_table

    for name in tasks:
        if name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise ConfigError(f"tasks = {name!r}: no such file")
    config = EvaluatorConfig(model="moe", tasks=list(tasks))  # type: ignore[arg-type]
    try:
        manager = config.process_tasks()
    except ValueError as error:
        raise ConfigError(f"tasks = {' '.join(tasks)!r}: {error}") from error
    results = simple_evaluate(
        model=lm,
        tasks=config.tasks,  # type: ignore[arg-type]
        task_manager=manager,
        limit=limit,
        log_samples=False,
    )
    assert results is not None  # only processes other than the first get none
    table: dict[str, Any] = dict(results)
    metrics = {
        name: {key: value for key, value in row.items() if isinstance(value, int | float)}
        for name, row in table["results"].items()
    }
    return metrics, make_table(table) or ""


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
