"""How fast does the engine decode on this CPU against transformers' `generate`, at batch 1 and 8?

Both sides hold the same weights and decode greedily from the same prompt; that they write the same tokens is checked
before anything is timed. transformers runs its fastest expert implementation and a dynamic or static cache, whichever
is faster. Run: python benchmarks/generate.py [--config replica-nano] [--rounds 5]
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duel import Side, alternate, fastest, machine, write_record

CONFIGS = ("replica-nano", "replica-small")
PROMPT, NEW = 32, 128  # tokens
# "batched_mm" copies the weights of every token's experts, and is many times slower than these.
HF_EXPERTS = ("grouped_mm", "eager")


def _prompt(batch: int, vocab_size: int) -> Any:
    import torch

    return torch.randint(vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(0))


def make_ours(directory: str, batch: int) -> Callable[[], Any]:
    import torch

    import moe
    from moe.device import tune_cpu
    from moe.serve import Engine, SamplingParams

    tune_cpu()
    model = moe.load(directory + "/ours").eval()
    prompts = _prompt(batch, model.cfg.vocab_size).tolist()
    engine = Engine(model, max_running=batch, num_blocks=batch * (PROMPT + NEW) // 16, prefix_cache=False)
    params = SamplingParams(temperature=0, max_tokens=NEW)
    return lambda: torch.tensor([o.prompt_token_ids + o.token_ids for o in engine.generate(prompts, params)])


def make_hf(directory: str, batch: int, experts: str, cache: str) -> Callable[[], Any]:
    import torch
    from transformers import MixtralForCausalLM

    model: Any = MixtralForCausalLM.from_pretrained(
        directory + "/hf", attn_implementation="sdpa", experts_implementation=experts
    ).eval()
    prompt = _prompt(batch, model.config.vocab_size)
    mask = torch.ones_like(prompt)

    def call() -> Any:
        return model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            cache_implementation=cache,
            pad_token_id=0,
        )

    return call


def compare(config: str, batch: int, rounds: int, directory: str) -> dict[str, Any]:
    """Print the rows of one configuration and batch size; returns them as a record."""
    ours_tokens = make_ours(directory, batch)()
    hf_tokens = make_hf(directory, batch, "eager", "dynamic")()
    same = (ours_tokens == hf_tokens).float().mean().item()
    print(f"{config}, batch {batch}, {PROMPT} tokens in, {NEW} out: {same:.1%} of the tokens equal")
    hf = fastest(
        [
            Side(
                f"transformers {experts} {cache}",
                __file__,
                "make_hf",
                {"directory": directory, "batch": batch, "experts": experts, "cache": cache},
            )
            for experts in HF_EXPERTS
            for cache in ("dynamic", "static")
        ]
    )
    ours = Side("gpt4-moe", __file__, "make_ours", {"directory": directory, "batch": batch})
    alternate([ours, hf], rounds)
    for side in (ours, hf):
        print(f"  {side.name:36} {batch * NEW / side.median:8.0f} tokens/s")
    ratio = hf.median / ours.median
    print(f"  {ratio:.2f}x the tokens/s\n")
    return {
        "config": config,
        "batch": batch,
        "equal_tokens": same,
        "ours_tokens_per_second": batch * NEW / ours.median,
        "peer": hf.name,
        "peer_tokens_per_second": batch * NEW / hf.median,
        "ratio": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    print(machine(), "\n")
    records = []
    for config in arguments.config or CONFIGS:
        import moe
        from moe import hf

        with tempfile.TemporaryDirectory() as directory:
            model = moe.Transformer(moe.load_config(config))
            moe.save(model, directory + "/ours")
            hf.save(model, directory + "/hf")
            for batch in (1, 8):
                records.append(compare(config, batch, arguments.rounds, directory))
                write_record(arguments.json, {"machine": machine(), "records": records})


if __name__ == "__main__":
    main()
