"""torch.ops.dilated.ring_attention: typed, and the place where its kernels are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.fx.node import has_side_effect
from torch.library import Library
from typing_extensions import Unpack

from .options import Options
from .typed import operator

# If a compiler dropped a call whose results are unused, the other ranks would wait for this one.
has_side_effect(torch.ops.dilated.ring_attention.default)
has_side_effect(torch.ops.dilated.ring_attention_backward.default)


@operator
def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    group_name: str,
    *,
    shard_lengths: Sequence[int] | None = None,
    strategy: Literal["auto", "ring", "gather", "all_to_all"] = "auto",
    shard_layout: Literal["contiguous", "zigzag"] = "contiguous",
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """(out [B, n, H, D], lse [B, H, n]) of this rank's rows, both differentiable.

    query [B, n, H, D], key and value [B, n, Hkv, D] are the rows of a sequence that the ranks of
    the group hold one after the other, n = shard_lengths[rank], or the same on all by default. All
    ranks call, with the same arguments but for the tensors' contents and dropout_seed, and all run
    the backward or none. strategy: "ring", "gather", "all_to_all" or "auto". shard_layout "zigzag":
    of P ranks, rank i holds stretch i and then stretch 2P - 1 - i of the sequence; shard_lengths
    are those of all 2P.
    """
    raise NotImplementedError


def register_ring_attention(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> Library:
    """Registers the kernels of both operators, on CPU and CUDA, while the result is kept."""
    library = Library("dilated", "IMPL")  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        library.impl("ring_attention", forward, key)  # type: ignore[no-untyped-call]
        library.impl("ring_attention_backward", backward, key)  # type: ignore[no-untyped-call]
    return library
