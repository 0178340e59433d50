"""Which GPUs, and how many, to serve a model, and what training on them would take.

From the model's configuration alone, on any machine, without a GPU and without torch:

    python examples/plan_a_purchase.py mixtral-8x7b --users 200 --per-user 20
    python examples/plan_a_purchase.py path/to/config.json --hardware h100-sxm mi300x --weights fp8

The model is a shipped name, a .toml, or a Hugging Face config.json; any other name lists those that are shipped. What
comes out is a floor: every byte and every product at the card's peak rates, with as many users as the layout takes.
Prices are the hourly ones of configs/hardware, each with its source; `--price` takes yours.
"""

import argparse

from moe import plan

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mixtral-8x7b")
    parser.add_argument("--users", type=int, default=100, help="sequences that are written at the same time")
    parser.add_argument("--per-user", type=float, default=20.0, help="tokens/s that each of them wants at least")
    parser.add_argument("--context", type=int, default=4096, help="tokens that each sequence has")
    parser.add_argument("--weights", default="bf16", help="precision of the weights: bf16, fp8, int8, int4")
    parser.add_argument("--hardware", nargs="+", default=["a100-80", "h100-sxm", "h200", "mi300x"])
    parser.add_argument("--price", type=float, help="USD per GPU-hour, of all cards, instead of the shipped ones")
    parser.add_argument("--tokens", default="1 Ttoken", help="of a training run")
    parser.add_argument("--mfu", type=float, default=0.4, help="utilisation of that run")
    return parser.parse_args()


def smallest(args: argparse.Namespace, hardware: plan.Hardware) -> tuple[plan.Layout, int, float, float] | None:
    """(layout, sequences it takes, tokens/s of each, tokens/s of all) of the fewest GPUs that are enough."""
    for gpus in COUNTS:
        designs = plan.redesign(
            args.model, hardware, gpus=gpus, per_user=args.per_user, context=args.context, weights=args.weights
        )
        for d in designs:  # the cheapest first
            users = d.batch * d.layout.pp  # each stage of a pipeline has a batch at work
            if users >= args.users:
                return d.layout, users, d.per_user, d.throughput
    return None


def main() -> None:
    args = arguments()
    shape, counts = plan.load_shape(args.model), plan.params(args.model)
    print(f"{shape.name}: {counts.total / 1e9:,.1f}B parameters, {counts.active['both'] / 1e9:,.1f}B used per token")
    print(f"{args.users} users at {args.per_user:g} tokens/s or more, {args.context:,} tokens each, {args.weights}\n")
    row = "{:28} {:>5} {:20} {:>6} {:>10} {:>9} {:>10}   {:>14} {:>12}"
    names = ("card", "GPUs", "layout", "users", "tok/s each", "USD/day", "USD/Mtoken", "training: days", "USD")
    print(row.format(*names))
    for name in args.hardware:
        hardware = plan.load_hardware(name)
        found = smallest(args, hardware)
        if found is None:
            print(f"{hardware.name:28} not with {COUNTS[-1]} of them: fewer users, a slower rate, or narrower weights")
            continue
        layout, users, rate, of_all = found
        price = hardware.price if args.price is None else plan.quantity(f"{args.price} USD/h")
        hourly = layout.gpus * price.to("USD/h")
        run = plan.train_cost(
            shape, hardware, tokens=plan.quantity(args.tokens), gpus=layout.gpus, mfu=args.mfu, price=price
        )
        figures = (f"{rate:.1f}", f"{24 * hourly:,.0f}", f"{hourly / 3600 / of_all * 1e6:.3f}")
        training = (f"{run['train.days'].to('day'):,.0f}", f"{run['train.cost'].to('USD'):,.0f}")
        print(row.format(hardware.name, layout.gpus, layout.name, f"{users:,}", *figures, *training))
    print("\nOne figure with its formula: moe plan decode MODEL --explain decode.latency")


if __name__ == "__main__":
    main()
