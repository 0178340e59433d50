"""Models of transformers, imported, answer by the engine what transformers' own generate answers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe import hf
from moe.serve.engine import Engine
from moe.serve.request import SamplingParams
from tests.hf.test_mixtral import mixtral

pytest.importorskip("transformers")


def answers(theirs: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        whole = theirs.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        found.append(whole[0, len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("n_kv_heads", [1, 4])
def test_an_imported_mixtral_answers_as_transformers_does(n_kv_heads: int, tmp_path: Path) -> None:
    theirs = mixtral(num_key_value_heads=n_kv_heads, eos_token_id=None).double()
    theirs.save_pretrained(tmp_path)
    shared = list(range(7, 27))
    prompts = [[*shared, 1], [5, 6, 7] * 5, [*shared, 2, 3, 4], [9], shared]
    engine = Engine(
        hf.load(tmp_path), block_size=4, num_blocks=24, max_batch_tokens=20, speculative="ngram", adaptive=False
    )
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=16))
    assert [o.token_ids for o in outputs] == answers(theirs, prompts, 16)
    assert engine.stats.preemptions + engine.stats.drafted + outputs[2].cached_tokens > 0
