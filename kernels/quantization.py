"""Numbers of eight bits with a scale: what expert weights and cached keys and values are kept in to be read faster.

One scale for each vector along the last dimension: an output channel of a weight, a head of one position of a cache.
So a product is rescaled once per output, after it was summed.
"""

import torch
from torch import Tensor

# The largest number of each format. int8 is symmetric: -128 is not used. e4m3 has four exponent bits and three of the
# significand, and no infinity (Micikevicius et al. 2022, "FP8 formats for deep learning", table 1).
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """The eight-bit numbers, and scales with which x is about `data * scale.unsqueeze(-1)`.

    Args:
        x: [..., C] floating point.
        dtype: torch.int8, rounded to nearest, off by at most scale / 2; or torch.float8_e4m3fn, off by at most 1/16 of
            the number, or scale / 1024 if that is more.

    Returns:
        data [..., C] in `dtype`, and scale [...] float32: the vector's largest magnitude over that of the format, 1 for
        a vector of zeros. A vector that holds NaN or infinity has such a scale, and so comes back as no number either.

    Raises:
        ValueError: another dtype; the message names both.
    """
    if dtype not in LARGEST:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, LARGEST))}")
    x = x.float()
    amax = x.abs().amax(-1)
    # Of the smallest numbers the quotient would be zero: a scale of 1 takes them to zero without dividing by it.
    scale = amax / LARGEST[dtype]
    scale = torch.where(scale >= torch.finfo(torch.float32).tiny, scale, torch.where(scale.isnan(), scale, 1.0))
    data = x / scale.unsqueeze(-1)
    # The quotient may round to just over the largest number, which int8 would wrap around.
    data = data.clamp(-LARGEST[dtype], LARGEST[dtype])
    return (data.round() if dtype == torch.int8 else data).to(dtype), scale
