"""Attention over a paged cache as a torch op: fake, checks, and the choice of an implementation.

Shape suffixes as in reference.py.
"""

from itertools import pairwise

import torch
from torch import Tensor

from moe.kernels import cards, tiles
from moe.kernels.arguments import can_read, check_device, on_device_of, undispatched
from moe.kernels.attention import reference
from moe.kernels.quantization import LARGEST


def paged_attention(
    q_RHC: Tensor,
    k_PNC: Tensor,
    v_PNC: Tensor,
    blocks_QB: Tensor,
    starts: Tensor,
    lengths_Q: Tensor,
    block_size: int,
    *,
    max_query_len: int,
    max_seq_len: int,
    k_scale_PN: Tensor | None = None,
    v_scale_PN: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention of each request's last positions to all of its positions, whose keys and values lie in blocks.

    The keys and values of the rows themselves are in the cache already. It has no backward. A row's result has the same
    bits whatever other rows and requests there are ("triton").

    Args:
        q_RHC: queries, [R, H, C] floating point, the rows of a request one after the other; R may be 0.
        k_PNC: keys, [P, N, C] contiguous, N a divisor of H, each serving H/N heads; in the dtype of q, or int8 or
            float8_e4m3fn with scales. Position a of request q is in slot blocks[q, a // block_size] * block_size +
            a % block_size.
        v_PNC: values, as the keys.
        blocks_QB: each request's blocks, [Q, B] int32, contiguous within a row; what is behind its last is not read.
        starts: int32 [Q + 1]: request q has the rows [starts[q], starts[q + 1]), none or some.
        lengths_Q: int32 [Q]: how many positions a request has, its rows included; the rows are the last of them.
        block_size: positions of a block.
        max_query_len: at least the most rows of a request.
        max_seq_len: at least the largest length: what the launch is sized by, without looking at the device.
        k_scale_PN: float32, contiguous, one number for each position and head; see `quantize`.
        v_scale_PN: as k_scale_PN.
        impl: "reference" (any device and dtype), "triton" (CUDA: bfloat16, float16, float32; on CPU in Triton's
            interpreter), or None for the fastest.

    Returns:
        y_RHC in the dtype of q.

    Raises:
        ValueError: shapes, dtypes, devices or `impl` that do not fit, or, on a CPU, tables that point outside of the
            cache (elsewhere they are taken at their word). The message says which and why.
    """
    tables = (blocks_QB, starts, lengths_Q)
    _check(q_RHC, k_PNC, v_PNC, *tables, block_size, k_scale_PN, v_scale_PN)
    if impl not in (None, "reference", "triton"):
        raise ValueError(f'impl = {impl!r}: must be "reference" or "triton", or None for the fastest')
    reason = tiles.why_not_triton(q_RHC)
    if k_PNC.dtype == torch.float8_e4m3fn and q_RHC.device.type == "cuda" and not tiles.INTERPRETED:
        reason = reason or cards.why_not_e4m3(q_RHC.device)
    if impl == "triton" and reason:
        raise ValueError(f'impl = "triton": {reason}; use "reference"')
    impl = impl or ("reference" if reason or q_RHC.device.type == "cpu" else "triton")
    inputs = (q_RHC, k_PNC, v_PNC, *tables)
    run = _forward if undispatched(*inputs, k_scale_PN, v_scale_PN) else _paged_attention
    return run(*inputs, block_size, max_query_len, max_seq_len, k_scale_PN, v_scale_PN, impl)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check_device(q=q, k=k, v=v, blocks=blocks, starts=starts, lengths=lengths, k_scale=k_scale, v_scale=v_scale)
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or 0 in k.shape + q.shape[1:]:
        raise ValueError(
            "paged_attention wants q [R, H, C] and k, v [P, N, C]; got "
            f"{', '.join(str(list(t.shape)) for t in (q, k, v))}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: H must be a multiple of N")
    narrow = k.dtype in LARGEST
    if not q.is_floating_point() or k.dtype != v.dtype or not (narrow or k.dtype == q.dtype):
        raise ValueError(
            f"k and v must both be of the dtype of q, or of {' or '.join(map(str, LARGEST))}; got q {q.dtype}, "
            f"k {k.dtype}, v {v.dtype}"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != narrow:
            raise ValueError(f"{name} {'is missing' if narrow else 'is given'}, and keys and values are {k.dtype}")
        if scale is not None and (scale.shape != k.shape[:2] or scale.dtype != torch.float32):
            raise ValueError(
                f"{name} must be float32 {list(k.shape[:2])}; got {scale.dtype} {list(scale.shape)}: quantize makes it"
            )
    if not all(t is None or t.is_contiguous() for t in (k, v, k_scale, v_scale)):
        raise ValueError("k, v and their scales must be contiguous: a copy of a whole cache would be made unseen")
    if blocks.ndim != 2 or starts.shape != (len(blocks) + 1,) or lengths.shape != (len(blocks),):
        raise ValueError(
            "paged_attention wants blocks [Q, B], starts [Q + 1] and lengths [Q]; got "
            f"{', '.join(str(list(t.shape)) for t in (blocks, starts, lengths))}"
        )
    if not all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in (blocks, starts, lengths)):
        raise ValueError(
            "blocks, starts and lengths must be int32, without steps; got "
            f"{', '.join(f'{t.dtype} of strides {list(t.stride())}' for t in (blocks, starts, lengths))}"
        )
    if block_size < 1 or k.shape[0] % block_size:
        raise ValueError(f"block_size = {block_size}: must divide the {k.shape[0]} slots of the cache")


def _check_tables(
    q: Tensor, k: Tensor, blocks: Tensor, starts: Tensor, lengths: Tensor, block_size: int, most: int, longest: int
) -> None:
    """What can be seen of the tables on a CPU without waiting."""
    if not can_read(starts):
        return
    n_blocks = k.shape[0] // block_size
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != len(q) or sorted(bounds) != bounds:
        raise ValueError(f"starts = {bounds}: must rise from 0 to the {len(q)} rows of q")
    for i, (length, (low, high)) in enumerate(zip(lengths.tolist(), pairwise(bounds), strict=True)):
        if high - low > most or length > longest:
            raise ValueError(
                f"request {i} has {high - low} rows and {length} positions, more than max_query_len = {most} or "
                f"max_seq_len = {longest}"
            )
        if not high - low <= length <= blocks.shape[1] * block_size:
            raise ValueError(
                f"request {i} has {length} positions: must be at least its {high - low} rows, and at most the "
                f"{blocks.shape[1] * block_size} that {blocks.shape[1]} blocks of {block_size} hold"
            )
        used = blocks[i, : -(-length // block_size)]
        if len(used) and not 0 <= used.min().item() <= used.max().item() < n_blocks:
            raise ValueError(f"blocks of request {i} = {used.tolist()}: the cache has the blocks 0 to {n_blocks - 1}")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_size: int,
    max_query_len: int,
    max_seq_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    impl: str,
) -> Tensor:
    _check_tables(q, k, blocks, starts, lengths, block_size, max_query_len, max_seq_len)
    if impl == "reference":
        return reference.paged_attention(q, k, v, blocks, starts, lengths, block_size, k_scale, v_scale)
    from moe.kernels.attention import triton_paged

    with on_device_of(q):
        return triton_paged.paged_attention(
            q, k, v, blocks, starts, lengths, block_size, max_query_len, max_seq_len, k_scale, v_scale
        )


_paged_attention = torch.library.custom_op("gpt4_moe::paged_attention", _forward, mutates_args=())


@_paged_attention.register_fake
def _(q, k, v, blocks, starts, lengths, block_size, max_query_len, max_seq_len, k_scale, v_scale, impl):
    return q.new_empty(q.shape)
