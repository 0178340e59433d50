"""The shapes that the expert MLP is measured at, and what they cost: FLOP, bytes moved, bytes held.

Suffixes: T tokens, D model width, F expert hidden width, E experts, K experts per token, R = T*K rows; SwiGLU, G = 2.
"""

from typing import NamedTuple

FLUSHED = 256 * 2**20  # bytes written before a timed call: more than any second-level cache holds
SLACK = 512 * 2**20  # cuBLAS's workspaces, blocks rounded up, small tensors
COMPARED = 2  # experts whose weight gradients are kept for comparison
RING = 512 * 2**20  # bytes of results that a loop over experts writes in turn: past any second-level cache


class Shape(NamedTuple):
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    tokens: tuple[int, ...]

    def weights(self, itemsize: int = 2) -> int:
        """Bytes of all experts' weights, and of their gradients."""
        return 3 * self.n_experts * self.d_model * self.d_ff * itemsize

    def flop(self, tokens: int) -> int:
        """Of a forward; a backward is two of them."""
        return 6 * tokens * self.top_k * self.d_model * self.d_ff


SHAPES = {
    # The rows an expert has at full width, with a quarter of the experts: a quarter of memory and time.
    "gpt4-quarter": Shape(10752, 28672, 4, 2, (2048,)),
    # nanochat's mixture (pull request 798) at width 1536; with the shared expert, in dense.py.
    "nanochat": Shape(1536, 2048, 8, 2, (65536,)),
    "mixtral": Shape(4096, 14336, 8, 2, (8192,)),
    "gpt4": Shape(10752, 28672, 16, 2, (8192, 16384)),
    "gpt4 few": Shape(10752, 28672, 16, 2, (1, 8, 64, 512)),
    "gpt4-tp8": Shape(10752, 3584, 16, 2, (8192, 16384)),
    "fine-grained": Shape(2048, 768, 128, 8, (8192,)),
    "replica-1b": Shape(768, 2048, 16, 2, (8192, 32768)),
    "mixtral few": Shape(4096, 14336, 8, 2, (1, 8, 64, 512)),
}
FEW = ("gpt4 few", "mixtral few", "toy few")  # forward only: what decoding does
IMBALANCED = ("gpt4-tp8",)  # measured with every workload of routings.py, at its first size
DRY = {
    "toy": Shape(32, 32, 4, 2, (8,)),
    "toy traced": Shape(32, 32, 16, 2, (4,)),
    "toy few": Shape(32, 32, 4, 2, (1,)),
}


# -------------------------------------------------------------------------------------------------- bytes that are held


def ring_length(expert_bytes: int, n_experts: int) -> int:
    """How many experts' results a loop keeps: at least two, and so many that none is still in a cache when written."""
    return min(n_experts, max(2, -(-RING // expert_bytes)))


def side_bytes(shape: Shape, tokens: int, side: str, forward_only: bool, itemsize: int = 2, largest: int = 0) -> int:
    """The most a side holds at once beyond its inputs, its results counted: from the code of each.

    Args:
        side: "ours", "recompute", "grouped", "reference"; any other name is a peer under autograd.
        largest: rows of the busiest expert; 0: of a balanced routing.

    A peer is taken to hold what autograd keeps and makes of unfused operations, transformers' above all: not a bound.
    """
    D, F, E, K, _ = shape
    R, b, W = tokens * K, itemsize, shape.weights(itemsize)
    outputs = tokens * D * b * (1 if forward_only else 2) + 8 * R  # y, dx, dweights
    if side in ("ours", "recompute"):
        # Rows of x (the copy that TMA reads), h, act, y of the rows; backward, rows of dy, dh and both dw too.
        forward = R * b * (2 * D + (3 if side == "ours" else 1) * F)
        backward = W + R * b * (2 * D + 5 * F)
    elif side == "grouped":
        forward = R * b * (2 * D + 3 * F) + 8 * R * D
        backward = W + R * b * (3 * D + 6 * F) + 8 * R * D
    elif side == "reference":
        n = largest or -(-R // E)
        # The sum over experts is out of place, in float32; of one expert everything between x and y, or dw, is there.
        forward = max(8 * tokens * D + n * (2 * D * b + 4 * D), 4 * tokens * D + n * b * (D + 5 * F))
        backward = W + 4 * tokens * D + 2 * F * D * b + n * b * (3 * D + 11 * F) + 4 * n * D
    else:
        forward = R * max(b * (D + 4 * F), 2 * D * b + 8 * D)
        backward = W + R * b * (4 * D + 7 * F)
    return outputs + (forward if forward_only else max(forward, backward))


def peak_bytes(
    shape: Shape, tokens: int, side: str, forward_only: bool = False, itemsize: int = 2, largest: int = 0
) -> dict[str, int]:
    """What the device must hold while a side is compared and timed, part by part; their sum is "all".

    First the side runs beside what is kept of the reference (y, dx, dweights, two experts' dw), then beside the buffers
    of the cuBLAS loop (its rows, h, act, y, and a ring of dw).
    """
    D, F, E, K, _ = shape
    R, b, W = tokens * K, itemsize, shape.weights(itemsize)
    kept = tokens * D * b * (1 if forward_only else 2)
    loop = R * b * (2 * D + 3 * F)
    if not forward_only:
        kept += 4 * R + COMPARED * W // E
        loop += ring_length(W // E, E) * W // E
    parts = {
        "weights": W,
        "inputs": 2 * tokens * D * b + 12 * R,
        "beside": 0 if side == "reference" else max(kept, loop),
        "side": side_bytes(shape, tokens, side, forward_only, itemsize, largest),
        "rest": FLUSHED + SLACK,
    }
    return {**parts, "all": sum(parts.values())}


# -------------------------------------------------------------------------------------------------- each product's work


def product_work(product: str, shape: Shape, tokens: int, itemsize: int = 2) -> tuple[int, int]:
    """FLOP, and bytes that must be read or written once, of one product or of what goes around it.

    All experts count as touched (E <= R). The 2 MNK of a product alone are counted as FLOP, not activations.
    """
    D, F, E, K, _ = shape
    T, R, b = tokens, tokens * K, itemsize
    w_in, w_out = 2 * E * D * F * b, E * D * F * b
    return {
        "up": (4 * R * D * F, R * D * b + w_in + R * 3 * F * b),  # x -> h, act
        "down": (2 * R * D * F, R * F * b + w_out + R * D * b),  # act -> y
        "down_backward": (2 * R * D * F, R * D * b + w_out + R * 5 * F * b + 8 * R),  # dy, h -> dh, act, dweights
        "dw_out": (2 * R * D * F, R * (D + F) * b + w_out),  # dy, act
        "dw_in": (4 * R * D * F, R * (D + 2 * F) * b + w_in),  # dh, x
        "dx": (4 * R * D * F, R * 2 * F * b + w_in + R * D * b),  # dh -> dx
        "route": (0, R * (8 + 4 + 4)),  # ids -> order, inverse
        "gather": (0, T * D * b + R * D * b),  # x -> rows
        "combine": (2 * R * D, R * D * b + T * D * b + 8 * R),  # rows -> y
        "gate": (0, T * (4 * E + 12 * K)),  # logits -> weights, ids
    }[product]


PRODUCTS = ("up", "down", "down_backward", "dw_out", "dw_in", "dx")
AROUND = ("route", "gather", "combine", "gate")


def products_bytes(shape: Shape, tokens: int, itemsize: int = 2) -> int:
    """What products.py holds at most: inputs of every product, two results of dw_in's size, one expert in float32."""
    D, F, E, K, _ = shape
    R, b, W = tokens * K, itemsize, shape.weights(itemsize)
    rows = R * b * (6 * D + 14 * F)  # x, dy, h, act, dh, y in order and copies for each path; results; cuBLAS's results
    ring = ring_length(2 * D * F * b, E) * 2 * D * F * b
    return W + 2 * tokens * D * b + rows + 2 * W // 3 + ring + 16 * D * F + FLUSHED + SLACK
