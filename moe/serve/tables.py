"""Where the positions lie that the rows of a pass see, as `ops.paged_attention` reads it.

Shape suffixes: R rows, Q requests, B blocks of a request, H query heads, C head width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe.kernels import ops
from moe.layers import LayerCache, cast


def on_device(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers on the device; no one waits for their transfer."""
    x = torch.tensor(values, dtype=dtype)
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


class Tables(NamedTuple):
    """On the device of the cache, int32; the two numbers are upper bounds, known without asking the device."""

    blocks_QB: Tensor
    starts: Tensor  # [Q + 1]
    lengths_Q: Tensor
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of(
        cls, blocks: Sequence[Sequence[int]], counts: Sequence[int], ends: Sequence[int], device: torch.device
    ) -> "Tables":
        """Of requests with `counts` rows each, their last of `ends` positions, in one copy to the device."""
        most, Q = max(map(len, blocks)), len(blocks)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        padded = [b for row in blocks for b in (*row, *[0] * (most - len(row)))]
        flat = on_device(device, [*padded, *starts, *ends], torch.int32)
        blocks_QB, starts_, lengths_Q = flat.split([Q * most, Q + 1, Q])
        return cls(blocks_QB.view(Q, most), starts_, lengths_Q, max(counts), max(ends))

    def attend(self, q_RHC: Tensor, layer: LayerCache, scales: LayerCache | None, block_size: int) -> Tensor:
        """Causal attention of the rows to their requests' positions, in the dtype of q.

        Args:
            layer: the keys and values of the cache; scales: theirs, in eight bits.
        """
        k_scale_PN, v_scale_PN = scales or (None, None)
        q = q_RHC if scales else cast(q_RHC, layer[0].dtype)
        y_RHC = ops.paged_attention(
            q, *layer, self.blocks_QB, self.starts, self.lengths_Q, block_size,
            max_query_len=self.max_query_len, max_seq_len=self.max_seq_len,
            k_scale_PN=k_scale_PN, v_scale_PN=v_scale_PN,
        )  # fmt: skip
        return cast(y_RHC, q_RHC.dtype)
