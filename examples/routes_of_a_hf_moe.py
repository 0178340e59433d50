"""What the routers of a Hugging Face MoE do with your text: load of the experts, confidence, favourite tokens.

    python examples/routes_of_a_hf_moe.py path/to/Mixtral --text essays.txt code.py --trace runs/trace

The directory is one that `from_pretrained` reads: Mixtral, Qwen3-MoE, OLMoE, gpt-oss. Without one, a tiny Qwen3-MoE
with random weights is made here, over bytes, to show what comes out. Needs `pip install "gpt4-moe[hf]"`.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moe import profile


def tiny_model() -> tuple[Any, Callable[[str], list[int]], Callable[[int], str]]:
    """(model, text to ids, id to text)"""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config), lambda text: list(text.encode()), lambda i: repr(chr(i))


def pretrained(directory: Path) -> tuple[Any, Callable[[str], list[int]], Callable[[int], str]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    return model, tokenizer.encode, lambda i: repr(tokenizer.decode([i]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a directory; without it, a tiny random model")
    parser.add_argument("--text", nargs="+", type=Path, default=[Path(__file__)], help="text files; default: this one")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a forward pass")
    parser.add_argument("--trace", type=Path, help="record every token's experts here, for moe profile placement")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model, encode, show = pretrained(args.model) if args.model else tiny_model()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    ids = [i for file in args.text for i in encode(file.read_text(encoding="utf-8"))]
    S = min(args.seq_len, len(ids))
    windows = torch.tensor(ids[: len(ids) // S * S], device=device).view(-1, S)

    recording = profile.record(model, args.trace) if args.trace else contextlib.nullcontext()
    with torch.no_grad(), recording, profile.routing(model, vocab_size=model.config.vocab_size) as p:
        for tokens in windows.split(args.batch):
            model(input_ids=tokens)

    print(f"{type(model).__name__}, {windows.numel():,} tokens\n")
    print("layer  load entropy  CV     max/mean  dropped at 1.25  router entropy  top probability")
    rows = zip(
        p.load_entropy_L, p.load_cv_L, p.max_over_mean_L, p.drop_rate_L(1.25), p.router_entropy_L, p.top_probability_L,
        strict=True,
    )  # fmt: skip
    for layer, (load, cv, busiest, dropped, entropy, top) in enumerate(rows):
        print(f"{layer:5}  {load:12.3f}  {cv:.3f}  {busiest:8.2f}  {dropped:15.1%}  {entropy:14.3f}  {top:15.3f}")
    dead = p.dead_experts()
    print(f"\nexperts with less than a tenth of the mean load, as (layer, expert): {dead or 'none'}")

    layer = len(p.counts_LE) // 2
    expert = int(p.counts_LE[layer].argmax())
    favourites = ", ".join(f"{show(token)} {lift:.1f}x" for token, lift in p.top_tokens(layer, expert, n=6))
    print(f"busiest expert of layer {layer} is {expert}; tokens that it gets more often than others: {favourites}")
    if args.trace:
        print(f"\ntrace: {args.trace}; next: moe profile placement {args.trace} --gpus 4")


if __name__ == "__main__":
    main()
