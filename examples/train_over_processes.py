"""Train a model over many processes, on any mesh: a loop to copy, that goes on by itself when a process dies.

    moe data prepare --out data --vocab-size 512
    python examples/train_over_processes.py data --mesh tp=2,pp=2 --steps 20

starts four processes on this machine. Interrupt it, or kill one of them: the same command, or the launcher, goes on
from the newest checkpoint, on another mesh, too. Under torchrun it takes the ranks that were started. At the end it
writes an ordinary checkpoint, for `moe generate`.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

import moe
from moe.data import Mixture, TokenData
from moe.parallel.checkpoint import Checkpointer, latest
from moe.parallel.convert import export
from moe.parallel.degrees import Degrees
from moe.parallel.launch import inside, join, leave, start
from moe.parallel.mesh import make_meshes
from moe.parallel.model import ParallelModel
from moe.parallel.step import Batch, clip_gradients, gradient_norm


def rank(arguments: argparse.Namespace) -> None:
    """What every process does."""
    cfg, degrees = moe.load_config(arguments.config), Degrees.parse(arguments.mesh)
    meshes = make_meshes(degrees, join(degrees).device)
    model = ParallelModel(cfg, meshes, seed=arguments.seed)
    optimizers = [torch.optim.AdamW(part.parameters(), lr=arguments.lr, foreach=False) for part in model.parts]
    # Which windows a step has follows from its number alone, on any mesh.
    windows = Mixture(TokenData.open(arguments.data), cfg.max_seq_len, arguments.seed)
    own = arguments.batch_size // degrees.dp
    mine = slice(meshes.data.get_local_rank() * own, (meshes.data.get_local_rank() + 1) * own)
    checkpoints = Checkpointer(arguments.out / "checkpoints", cfg)
    saved = checkpoints.load(model.parts, optimizers)
    for step in range(saved["step"] if saved else 0, arguments.steps):
        batch = windows.batch(step * arguments.batch_size, arguments.batch_size)
        tokens, targets = (torch.from_numpy(x[mine]).long() for x in (batch.inputs, batch.targets))
        done = model.forward_backward(Batch(tokens, targets))
        norm = gradient_norm(model.parameters(), meshes)
        clip_gradients(model.parameters(), norm, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            lm, _, _ = done.sums
            loss = 0.0 if lm is None else lm.item() / int(done.counts.targets)
            print(f"step {step + 1}: {loss:.4f} nats, gradient {norm.item():.3f}", flush=True)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            checkpoints.save(step + 1, model.parts, optimizers, {"batch_size": arguments.batch_size})
    checkpoints.close()
    leave()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared by `moe data prepare`, for the vocabulary of the model")
    parser.add_argument("--config", default="replica-tiny")
    parser.add_argument("--mesh", default="tp=2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=3, help="how often ranks are started again when one dies")
    parser.add_argument("--out", type=Path, default=Path("runs/processes"))
    arguments = parser.parse_args()
    degrees = Degrees.parse(arguments.mesh)
    degrees.check(moe.load_config(arguments.config), batch_size=arguments.batch_size)
    if inside():
        rank(arguments)
        return
    start(rank, degrees.world, arguments, max_restarts=arguments.restarts)
    newest = latest(arguments.out / "checkpoints")
    assert newest is not None
    export(newest, arguments.out / "final", tokenizer=TokenData.open(arguments.data).tokenizer())
    print(f"for moe generate: {arguments.out / 'final'}")


if __name__ == "__main__":
    main()
