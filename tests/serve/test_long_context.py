"""A context of 32k tokens on a CPU: the answer is the uncached model's, and memory grows as the context does."""

import os
import subprocess
import sys

import pytest
import torch

from moe import Transformer, load_config
from moe.serve import Engine, SamplingParams
from tests.conftest import ROOT, rel

LENGTH, NEW = 32_768, 6

PEAK = """
import resource, sys, torch
from moe import Transformer, load_config
from moe.serve import Engine, SamplingParams
n = int(sys.argv[1])
cfg = load_config("replica-nano").with_overrides(["max_seq_len=32768"])
engine = Engine(Transformer(cfg), num_blocks=n // 16, max_batch_tokens=256)
engine.generate([[i % 61 for i in range(n - 2)]], SamplingParams(max_tokens=2, temperature=0))
kept = [t for pair in engine.runner.pages.layers for t in pair]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sum(t.numel() * t.element_size() for t in kept))
"""


@pytest.mark.slow
def test_a_full_context_of_32k_tokens_gives_the_uncached_models_answer() -> None:
    cfg = load_config("replica-nano").with_overrides([f"max_seq_len={LENGTH}"])
    model = Transformer(cfg, seed=1)
    prompt = torch.randint(cfg.vocab_size, (LENGTH - NEW,), generator=torch.Generator().manual_seed(0))
    engine = Engine(model, num_blocks=LENGTH // 16, max_batch_tokens=1024)
    (output,) = engine.generate([prompt.tolist()], SamplingParams(max_tokens=NEW, temperature=0, logprobs=0))
    with torch.no_grad():
        whole = torch.cat([prompt, torch.tensor(output.token_ids)])
        log_SV = model(whole.unsqueeze(0)).logits_BSV[0, -NEW - 1 : -1].log_softmax(-1)
    assert output.token_ids == log_SV.argmax(-1).tolist()
    assert output.logprobs is not None
    found = [one[token].logprob for one, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert rel(torch.tensor(found), log_SV.amax(-1)) < 1e-4


@pytest.mark.slow
def test_memory_grows_with_the_context_and_not_with_its_square() -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    peaks, pages = [], []
    for n in (8192, 16_384, 32_768):
        out = subprocess.run([sys.executable, "-c", PEAK, str(n)], env=env, check=True, capture_output=True, text=True)
        peak, own = map(int, out.stdout.split())
        peaks.append(peak * 1024)
        pages.append(own)
    # Of a cache all of whose slots are in use, and of a pass's temporaries, each linear; a square would be four times.
    assert pages[2] - pages[1] == 2 * (pages[1] - pages[0])
    assert peaks[2] - peaks[1] < 3 * max(peaks[1] - peaks[0], pages[1] - pages[0])
