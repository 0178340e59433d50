"""Triton's interpreter as the kernels need it, on every version that is supported; tiles.py loads this where it is on.

The interpreter of Triton 3.6 takes an array of one element for an index, which numpy does from 2.4 on no longer:
`range(0, n)` over an argument of a kernel fails. Later versions of Triton take the element, and so does this.
"""

from typing import Any

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _with_index
