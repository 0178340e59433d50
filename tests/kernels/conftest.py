"""What the tests of the kernels share: memory that nothing has written reads as NaN, and products that are even."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """New memory (torch.empty and its kin, and what ATen allocates for its results) holds NaN, integers the largest.

    So a kernel that leaves a part of its output unwritten fails, whatever the allocator hands out. Torch does so in its
    deterministic mode; operations that have no deterministic form only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _even_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, products whose rows come out alike wherever in a tile they are, as of tensor cores.

    The interpreter's are numpy's, whose library sums the last rows of a matrix in another order than the first.
    """
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype=None: np.einsum("mk,kn->mn", a, b, dtype=dtype))
