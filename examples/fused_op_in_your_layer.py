"""The fused expert op in a layer of your own: your router, your weights, one call for all the experts.

    python examples/fused_op_in_your_layer.py --experts 16 --top-k 2 --d-model 128 --d-ff 256 --tokens 2048

It trains the layer on a toy task, and compares the op with a loop over the experts: outputs, gradients, time. Copy
`ExpertLayer`; on a CUDA GPU the same call runs as Triton kernels. Shape suffixes: T tokens, D model width, E experts,
K experts of a token, F width of an expert, G gate and up.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe.kernels import ops


class ExpertLayer(nn.Module):
    """[..., D] -> [..., D]: the best `top_k` of the experts, weighed by a softmax over them."""

    def __init__(self, d_model: int, d_ff: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.w_in_EGFD = nn.Parameter(torch.randn(n_experts, 2, d_ff, d_model) / d_model**0.5)
        self.w_out_EDF = nn.Parameter(torch.randn(n_experts, d_model, d_ff) / d_ff**0.5)

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.flatten(0, -2)
        weights_TK, ids_TK = ops.topk_gate(self.router(x_TD), self.top_k)
        y_TD = ops.expert_mlp(x_TD, self.w_in_EGFD, self.w_out_EDF, weights_TK, ids_TK, activation="swiglu")
        return y_TD.view_as(x)

    def by_a_loop(self, x: Tensor) -> Tensor:
        """The same, as it is usually written."""
        x_TD = x.flatten(0, -2)
        top_TK, ids_TK = self.router(x_TD).topk(self.top_k)
        weights_TK, y_TD = top_TK.softmax(-1), torch.zeros_like(x_TD)
        for e in range(len(self.w_in_EGFD)):
            rows, choice = (ids_TK == e).nonzero(as_tuple=True)
            gate, up = self.w_in_EGFD[e]
            hidden = F.silu(x_TD[rows] @ gate.T) * (x_TD[rows] @ up.T)
            y_TD = y_TD.index_add(0, rows, weights_TK[rows, choice, None] * (hidden @ self.w_out_EDF[e].T))
        return y_TD.view_as(x)


def gradients(layer: ExpertLayer, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(forward(x).square().mean(), list(layer.parameters())))


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[1:])[repeats // 2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-ff", type=int, default=256)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = ExpertLayer(args.d_model, args.d_ff, args.experts, args.top_k).to(device)
    x = torch.randn(args.tokens, args.d_model, device=device)

    error = (layer(x) - layer.by_a_loop(x)).abs().max() / layer.by_a_loop(x).abs().max()
    print(f"output against a loop: largest difference {error:.1e} of the largest value")
    pairs = zip(gradients(layer, layer, x), gradients(layer, layer.by_a_loop, x), layer.named_parameters(), strict=True)
    for ours, loops, (name, _) in pairs:
        print(f"gradient of {name}: {(ours - loops).norm() / loops.norm():.1e}")
    fused = milliseconds(lambda: gradients(layer, layer, x))
    loop = milliseconds(lambda: gradients(layer, layer.by_a_loop, x))
    print(f"forward and backward on {device}: {fused:.1f} ms, by a loop {loop:.1f} ms")

    target = torch.tanh(x.roll(1, dims=1)) * x
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    for step in range(args.steps):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, args.steps - 1):
            print(f"step {step + 1}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
