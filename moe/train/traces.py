"""The routing of some training steps, as traces in RUN/traces/step-000100, one pass to a micro-batch.

Shape suffixes: L layers, B windows, S sequence, T = B*S tokens, E experts, K experts per token.
"""

from pathlib import Path

import torch
from torch import Tensor

from moe.io.files import atomic_directory
from moe.model import Output
from moe.profile import Pass, Recorder

TRACES = "traces"


def routing_of(out: Output, tokens_BS: Tensor) -> Pass:
    """What a forward pass reports of its routing; no hooks, so that a compiled model reports it too."""
    parts = ([getattr(r, name).detach() for r in out.routing] for name in ("ids_TK", "weights_TK", "logits_TE"))
    ids_LTK, weights_LTK, logits_LTE = map(torch.stack, parts)
    text_BS, (batch, length) = out.routing[0].text_BS, tokens_BS.shape
    text_T = None if text_BS is None else text_BS.flatten()
    return Pass(ids_LTK, weights_LTK, logits_LTE, (batch, length), tokens_BS.flatten(), text_T)


def write(run_dir: Path, step: int, passes: list[Pass], n_experts: int) -> Path:
    """The trace of one step, whole or not at all; that of an earlier attempt at the same step is replaced."""
    place = run_dir / TRACES / f"step-{step:06d}"
    with atomic_directory(place) as temporary, Recorder(temporary, n_experts) as recorder:
        for one in passes:
            recorder.add(one)
    return place
