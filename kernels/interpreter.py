"""Triton's interpreter as the kernels need it, on every version that is supported; tiles.py loads this where it is on.

The interpreter of Triton 3.6 takes an array of one element for an index, which numpy does from 2.4 on no longer:
`range(0, n)` over an argument of a kernel fails. Triton 3.9 takes the element, and so is done here before it.
"""

from typing import Any

import triton
from triton.runtime import interpreter

_patch_lang_tensor = getattr(interpreter, "_patch_lang_tensor", None)


def _with_index(tensor: Any, scope: Any) -> None:
    assert _patch_lang_tensor is not None
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


if _patch_lang_tensor and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    interpreter._patch_lang_tensor = _with_index
