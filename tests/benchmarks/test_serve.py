"""The benchmark of serving: its workload, its comparison, and the weights as llama.cpp reads them."""

import importlib
from typing import Any

import numpy as np
import torch

from moe.config import RopeConfig
from moe.layers import rope_tables, rotate

serve: Any = importlib.import_module("serve")  # of benchmarks/


def test_workload_is_the_one_that_is_said() -> None:
    prompts, wanted = serve.workload()
    assert (len(prompts), sum(map(len, prompts)), sum(wanted)) == (32, 4480, 2400)
    assert all(0 <= i < serve.VOCABULARY for prompt in prompts for i in prompt)
    assert max(len(p) + n for p, n in zip(prompts, wanted, strict=True)) <= serve.CONTEXT


def test_queries_and_keys_meet_as_ours_do_when_neighbours_are_turned() -> None:
    """llama.cpp turns pairs (2i, 2i + 1) of a head where we turn (i, i + C/2); the scores must be the same."""
    C, D, S = serve.HEAD_DIM, 16, 5
    g = torch.Generator().manual_seed(0)
    weights = {f"blocks.0.attention.w{p}.weight": torch.randn(C, D, generator=g).double() for p in "qk"}
    names = ("embedding", "norm", "head", "blocks.0.attention_norm", "blocks.0.mlp_norm", "blocks.0.moe.router")
    others = {f"{name}.weight": np.zeros((2, D)) for name in names}
    others |= {f"blocks.0.attention.w{p}.weight": np.zeros((2, D)) for p in "vo"}
    others |= {f"blocks.0.moe.experts.{p}": np.zeros((2, 2, 4, D)) for p in ("w_in_EGFD", "w_out_EDF")}
    every = {**others, **{name: w.numpy() for name, w in weights.items()}}
    theirs = dict(serve._gguf_tensors(every, {"d_model": D, "n_layers": 1}))
    x_SD = torch.randn(S, D, generator=g).double()
    cos, sin = rope_tables(0, S, C, RopeConfig(), torch.float64, torch.device("cpu"))
    ours_q, ours_k = (rotate((x_SD @ w.t()).unsqueeze(1), cos, sin)[:, 0] for w in weights.values())

    def turned(name: str) -> torch.Tensor:
        pairs = (x_SD @ torch.from_numpy(theirs[f"blk.0.attn_{name}.weight"]).t()).view(S, C // 2, 2)
        c, s = cos[:, 0, : C // 2], -sin[:, 0, : C // 2]
        return torch.stack([pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 0] * s + pairs[..., 1] * c], -1).flatten(
            1
        )

    assert torch.allclose(turned("q") @ turned("k").t(), ours_q @ ours_k.t(), rtol=1e-10)


def test_ratios_are_to_the_best_of_the_others() -> None:
    speeds = {
        "gpt4-moe float32": 30,
        "vLLM float32": 10,
        "llama.cpp f32": 20,
        "gpt4-moe int8": 50,
        "llama.cpp q8_0": 25,
    }
    rows = [{"side": s, "tokens_per_second": v, "tokens_per_cpu_second": 2 * v} for s, v in speeds.items()]
    rows.append({"side": "gpt4-moe batch-invariant", "tokens_per_second": 3, "tokens_per_cpu_second": 15})
    found = serve.ratios(rows)
    assert found["float32 tokens_per_second"] == found["float32 tokens_per_cpu_second"] == 1.5
    assert found["int8 tokens_per_second"] == 2
    assert found["batch_invariant tokens_per_cpu_second"] == 0.25
