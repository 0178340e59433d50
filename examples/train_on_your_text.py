"""Train a small mixture of experts on your own text, on a CPU or a GPU, and let it write.

    python examples/train_on_your_text.py novel.txt letters.txt --out runs/mine --steps 2000 --d-model 192

Files are cut at empty lines into documents of a few paragraphs; one in twenty is held out and scored. Interrupted, the
same command goes on where it stopped. For text that is already one file per document, or JSONL, parquet or a dataset,
`moe data prepare` and `moe train` do the same from the command line.
"""

import argparse
import json
from pathlib import Path

import torch

import moe


def documents(file: Path, size: int) -> list[str]:
    """The file's paragraphs, in documents of at least `size` characters."""
    found, current = [], ""
    for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
        current += paragraph + "\n\n"
        if len(current) >= size:
            found.append(current)
            current = ""
    return [*found, current] if current.strip() else found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="text files, each a source of its own")
    parser.add_argument("--out", type=Path, default=Path("runs/mine"))
    parser.add_argument("--document-size", type=int, default=1000, help="characters of a document, at least")
    parser.add_argument("--vocab-size", type=int, default=512, help="ids of the byte-level BPE; 4,096 for megabytes")
    parser.add_argument("--d-model", type=int, default=96, help="width, a multiple of 96")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=128, help="tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt", default="The ")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cut = args.out / "documents"
    cut.mkdir(parents=True, exist_ok=True)
    for file in args.text:
        lines = [json.dumps({"text": text}) for text in documents(file, args.document_size)]
        (cut / f"{file.stem}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = [f"{file.stem}={cut / file.stem}.jsonl" for file in args.text]
    info = moe.data.prepare(sources, args.out / "data", vocab_size=args.vocab_size, overwrite=True)
    for source, splits in info.splits.items():
        print(f"{source}: " + ", ".join(f"{s.documents:,} documents for {split}" for split, s in splits.items()))

    cfg = moe.load_config("replica-tiny").scaled(
        d_model=args.d_model, n_layers=args.layers, vocab_size=info.vocab_size, max_seq_len=args.context, name="mine"
    )
    every = max(1, args.steps // 4)
    settings = [f"steps={args.steps}", f"batch_size={args.batch}", f"warmup={max(1, args.steps // 10)}"]
    settings += [f"eval_every={every}", f"save_every={every}", "eval_tokens=4096"]
    cfg = cfg.with_overrides([f"train.{setting}" for setting in settings])
    result = moe.train.train(cfg, info.path, args.out / "run")
    if result.status == "stopped":
        print("the same command goes on from here")
        return

    final = args.out / "run" / "final"
    model, tokenizer = moe.load(final), moe.load_tokenizer(final)
    prompt = torch.tensor([tokenizer.encode(args.prompt)])
    tokens = model.generate(prompt, max_new_tokens=40, temperature=0.8, top_p=0.95)
    print(f"\n{tokenizer.decode(tokens[0].tolist())}\n\nmore of it: moe generate {final} --prompt ...")


if __name__ == "__main__":
    main()
