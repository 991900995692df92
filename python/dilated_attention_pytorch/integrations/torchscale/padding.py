"""The padding mask that torchscale's encoder hands to every layer, whether anything is masked or
not.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.compiler import is_compiling


class PaddingCheck:
    """Refuses masks that mask, reading a mask that all layers get once: a read waits for the GPU.

    The layers of a model share one. Copies remember nothing.
    """

    def __init__(self) -> None:
        self._empty: weakref.ref[Tensor] | None = None
        self._version = 0

    def __reduce__(self) -> tuple[type[PaddingCheck], tuple[()]]:
        return PaddingCheck, ()

    def __call__(self, mask: Tensor) -> None:
        """Raises ValueError if the mask masks a position; compiled, RuntimeError when it runs."""
        if is_compiling():  # reading it would break the graph
            nothing = mask.any().logical_not()
            torch._assert_async(nothing, "key_padding_mask must mask no position, got some")
            return
        version = 0 if mask.is_inference() else mask._version
        if self._empty is not None and self._empty() is mask and self._version == version:
            return
        if mask.any():
            count = int(mask.count_nonzero())
            raise ValueError(f"key_padding_mask must mask no position, got {count} that it masks")
        self._empty, self._version = weakref.ref(mask), version
