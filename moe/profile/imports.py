"""Routing traces of what inference servers return with their answers. Nothing that cannot be right is taken in.

Shape suffixes: S positions of a request, L layers, K experts per token.
"""

import base64
import binascii
import os
import warnings
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.errors import TraceError
from moe.io.files import atomic_directory, is_taken
from moe.profile.trace import Recorder, Trace, wrong_ids

_END = object()


def import_routed_experts(
    path: str | os.PathLike[str],
    requests: Iterable[np.ndarray | Tensor | str],
    *,
    n_layers: int,
    n_experts: int,
    top_k: int,
    tokens: Iterable[Sequence[int]] | None = None,
) -> Trace:
    """Makes a trace of what a server returned with its requests, each of them one pass of one sequence.

    Args:
        path: a new or empty directory. After an error nothing is there.
        requests: vLLM's `CompletionOutput.routed_experts`, integer arrays [S, L, K]; or SGLang's
            `meta_info["routed_experts"]`, base64 of int32 in the same order. Ids are those of the checkpoint's experts,
            not of a server's physical slots (EPLB's copies).
        tokens: the token ids of each request, those of exactly its rows, from the first on. One more at the end is
            dropped (servers do not run the last token that they sample), and counted in `Trace.missing`.

    Raises:
        TraceError: another shape or dtype, experts out of range or twice for a token (as rows that the server did not
            fill have them), or rows for other than the tokens; the message names the request and the row. With
            `top_k` = 1 a row that was not filled looks like expert 0: where whole rows do, there is a warning.
    """
    if is_taken(path):
        raise TraceError(f"{path}: exists and is not an empty directory; choose another")
    lists: Iterable[Any] = tokens if tokens is not None else ()
    with atomic_directory(path) as place, Recorder(place, n_experts) as recorder:
        for number, (request, own) in enumerate(zip_longest(requests, lists, fillvalue=_END)):
            where = f"request {number}"
            if request is _END or (own is _END and tokens is not None):
                lacks = "there is none, but a list of tokens for it" if request is _END else "has no list of tokens"
                raise TraceError(f"{where}: {lacks}; give as many as requests")
            ids_SLK = _ids(where, request, n_layers, top_k)
            if wrong := wrong_ids(ids_SLK, n_experts):
                raise TraceError(
                    f"{where}: {wrong}: rows that the server did not fill, or its physical experts; leave the request "
                    "out, or map its ids to the checkpoint's experts"
                )
            if top_k == 1 and n_layers > 1 and (unfilled := int((ids_SLK == 0).all(2).all(1).sum())):
                warnings.warn(f"{where}: {unfilled} rows are all expert 0: did the server fill them?", stacklevel=2)
            own_S = None if tokens is None else _tokens(where, own, len(ids_SLK))
            recorder.missing += 0 if own_S is None else len(own_S) - len(ids_SLK)
            if len(ids_SLK):
                shape = torch.tensor([[1, len(ids_SLK)]], dtype=torch.int32)
                recorder.add_rows(ids_SLK, None, None if own_S is None else own_S[: len(ids_SLK)], shape)
    return Trace.open(path)


def _ids(where: str, request: Any, n_layers: int, top_k: int) -> Tensor:
    """A request's rows, int64 [S, L, K]."""
    if isinstance(request, str | bytes):
        try:
            content = base64.b64decode(request, validate=True)
        except (binascii.Error, ValueError) as error:
            raise TraceError(f"{where}: not base64 ({error})") from None
        if len(content) % (4 * n_layers * top_k):
            raise TraceError(f"{where}: {len(content)} bytes do not divide into int32 ids of {n_layers} x {top_k}")
        flat = np.frombuffer(content, dtype=np.int32)
        if flat.size and not flat[1::2].any():
            raise TraceError(f"{where}: every second id is 0, as in int64; want int32")
        request = flat.reshape(-1, n_layers, top_k)
    elif isinstance(request, Tensor):
        request = request.detach().cpu()
        request = request.numpy() if request.dtype != torch.bfloat16 else request.float().numpy()
    try:
        array = np.asarray(request)
    except ValueError as error:
        raise TraceError(f"{where}: rows of unequal length ({error})") from None
    if array.ndim != 3 or array.shape[1:] != (n_layers, top_k):
        raise TraceError(f"{where}: shape {list(array.shape)}; want [tokens, {n_layers}, {top_k}]")
    if not np.issubdtype(array.dtype, np.integer):
        raise TraceError(f"{where}: ids of the dtype {array.dtype}; want integers")
    return torch.from_numpy(array.astype(np.int64))


def _tokens(where: str, own: Any, rows: int) -> Tensor:
    """The ids of a request's tokens, int64: as many as its rows, or one more."""
    try:
        array = np.asarray(own)
    except ValueError as error:
        raise TraceError(f"{where}: tokens {error}") from None
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TraceError(f"{where}: tokens must be one list of integers, not {array.dtype} {list(array.shape)}")
    if len(array) - rows not in (0, 1):
        raise TraceError(
            f"{where}: {rows} rows for {len(array)} tokens, of which only the last may be without; give the tokens of "
            "exactly these rows (a server may leave out the prompt, or what it had cached)"
        )
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31:
        raise TraceError(f"{where}: token ids outside 0 to 2^31 - 1")
    return torch.from_numpy(array.astype(np.int64))
