"""How fast is a training step on this CPU, and how much memory does it take, against transformers' Mixtral?

Both sides run the same shape, batch, dtype and optimizer (fused AdamW, gradients clipped): ours as `moe train` runs
it, transformers with its fastest expert implementation, found first. transformers computes no balance loss here; ours
does. Run: python benchmarks/train_step.py [--config replica-nano] [--rounds 7]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duel import Side, alternate, fastest, machine, write_record

SHAPES = {"replica-nano": (16, 256), "replica-small": (16, 256)}  # sequences, tokens each, as their recipes train
HF_EXPERTS = ("grouped_mm", "eager", "batched_mm")


def make_ours(config: str, batch: int, seq_len: int, dtype: str) -> Callable[[], None]:
    import torch

    import moe
    from moe.device import tune_cpu

    tune_cpu()
    model = moe.Transformer(moe.load_config(config))
    return _step(model, lambda tokens, targets: model(tokens, targets).loss, batch, seq_len, dtype, torch)


def make_hf(config: str, batch: int, seq_len: int, dtype: str, experts: str) -> Callable[[], None]:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    import moe
    from moe.hf.families.mixtral import config_to_hf

    torch.manual_seed(0)
    hf_config = MixtralConfig(**config_to_hf(moe.load_config(config)))
    hf_config._attn_implementation = "sdpa"
    hf_config._experts_implementation = experts
    model = MixtralForCausalLM(hf_config).float()
    mask = torch.ones(batch, seq_len, dtype=torch.int64)

    def loss(tokens: Any, targets: Any) -> Any:
        # The labels are shifted already; transformers takes them as they are through shift_labels.
        return model(input_ids=tokens, attention_mask=mask, labels=targets, shift_labels=targets, use_cache=False).loss

    return _step(model, loss, batch, seq_len, dtype, torch)


def _step(model: Any, loss: Callable, batch: int, seq_len: int, dtype: str, torch: Any) -> Callable[[], None]:
    """One optimizer step on fixed random tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.get_input_embeddings().num_embeddings if hasattr(model, "lm_head") else model.cfg.vocab_size
    tokens = torch.randint(vocab_size, (batch, seq_len + 1), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            value = loss(inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(config: str, rounds: int) -> dict[str, Any]:
    """Print the table of one configuration; returns it as a record."""
    batch, seq_len = SHAPES[config]
    tokens = batch * seq_len
    record: dict[str, Any] = {"config": config, "batch": batch, "seq_len": seq_len}
    best: dict[str, tuple[float, int]] = {}
    for dtype in ("fp32", "bf16"):
        settings = {"config": config, "batch": batch, "seq_len": seq_len, "dtype": dtype}
        print(f"{config}, {batch} x {seq_len} tokens, {dtype}: transformers' expert implementations")
        hf = fastest([Side(f"transformers {e}", __file__, "make_hf", {**settings, "experts": e}) for e in HF_EXPERTS])
        ours = Side("gpt4-moe", __file__, "make_ours", settings)
        alternate([ours, hf], rounds)
        for key, side in (("ours", ours), ("transformers", hf)):
            print(
                f"  {side.name:28} {side.median * 1e3:8.0f} ms {tokens / side.median:8.0f} tokens/s "
                f"{side.peak_bytes / 2**30:6.2f} GiB"
            )
            row = {"side": side.name, "ms": side.median * 1e3, "peak_gib": side.peak_bytes / 2**30}
            record[f"{key} {dtype}"] = row
            if key not in best or side.median < best[key][0]:
                best[key] = (side.median, side.peak_bytes)
        print(
            f"  {dtype}: {hf.median / ours.median:.2f}x the tokens/s, "
            f"{ours.peak_bytes / hf.peak_bytes:.2f}x the peak memory\n"
        )
    speed = best["transformers"][0] / best["ours"][0]
    memory = best["ours"][1] / best["transformers"][1]
    print(f"{config}, each side's fastest dtype: {speed:.2f}x the tokens/s, {memory:.2f}x the peak memory\n")
    return {**record, "speed_ratio": speed, "memory_ratio": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the record here")
    arguments = parser.parse_args()
    print(machine(), "\n")
    records = [compare(config, arguments.rounds) for config in arguments.config or SHAPES]
    write_record(arguments.json, {"machine": machine(), "records": records})


if __name__ == "__main__":
    main()
