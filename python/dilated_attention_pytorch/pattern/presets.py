"""Head offsets and padding by the name of whose attention is meant."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from .branch import Padding
from .offsets import Offsets

Convention = Literal["longnet", "torchscale", "gigapath", "longvit"]


class Preset(TypedDict):
    """Two arguments of `dilated_attention` and of the modules: `head_offsets` and `padding`."""

    head_offsets: Offsets
    padding: Padding


def preset(name: Convention) -> Preset:
    """Arguments of `dilated_attention` and of the modules: `head_offsets` and `padding`.

    Args:
        name: "longnet": the paper's. "torchscale", and "gigapath" and "longvit", whose weights were
            trained with it: heads in contiguous blocks, and keys of score 0 where a segment is cut
            short.

    Returns:
        A new dictionary, for `dilated_attention(..., **preset("gigapath"))`.

    Raises:
        ValueError: another name.
    """
    if name == "longnet":
        return {"head_offsets": "interleaved", "padding": "masked"}
    if name in ("torchscale", "gigapath", "longvit"):
        return {"head_offsets": "blocked", "padding": "zeros"}
    raise ValueError(f"name must be 'longnet', 'torchscale', 'gigapath' or 'longvit', got {name!r}")
