"""From tensors of a whole sequence to a rank's rows, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .arguments import check_shard_lengths
from .group.process_group import Group, gather_rows, group_name, group_size, rank_in
from .plans.layout import ShardLayout, check_layout, positions_of, shards, stretches_per_rank


def shard_positions(
    seq_len: int,
    group: Group,
    *,
    shard_lengths: Sequence[int] | None = None,
    shard_layout: ShardLayout = "contiguous",
) -> Tensor:
    """int64 [rows]: the positions of this rank's rows, for rotary or other position codes.

    Raises ValueError where shard_lengths are wrong or, without any, equal ones do not add up to
    seq_len.
    """
    return _positions(seq_len, group_name(group), shard_lengths, shard_layout)[0]


def shard(
    x: Tensor,
    group: Group,
    *,
    dim: int = 1,
    shard_lengths: Sequence[int] | None = None,
    shard_layout: ShardLayout = "contiguous",
) -> Tensor:
    """This rank's rows of a tensor whose dimension `dim` is the whole sequence; differentiable.

    Raises ValueError as `shard_positions` does.
    """
    rows = _positions(x.size(dim), group_name(group), shard_lengths, shard_layout)[0]
    return x.index_select(dim, rows.to(x.device))


def unshard(
    x: Tensor,
    group: Group,
    *,
    dim: int = 1,
    shard_lengths: Sequence[int] | None = None,
    shard_layout: ShardLayout = "contiguous",
) -> Tensor:
    """The whole sequence's tensor, on every rank, of each rank's rows; without gradients.

    All ranks call it. Without shard_lengths all have as many rows. Raises ValueError as
    `shard_positions` does.
    """
    name = group_name(group)
    total = x.size(dim) * group_size(name) if shard_lengths is None else sum(shard_lengths)
    own, positions = _positions(total, name, shard_lengths, shard_layout)
    if len(own) != x.size(dim):
        raise ValueError(
            f"x: must have this rank's {len(own)} rows in dimension {dim}, got {list(x.shape)}"
        )
    parts = gather_rows(x.movedim(dim, 0).contiguous(), list(map(len, positions)), name)
    whole = x.new_empty(total, *parts[0].shape[1:])
    for rows, part in zip(positions, parts, strict=True):
        whole[rows.to(x.device)] = part
    return whole.movedim(0, dim)


def _positions(
    seq_len: int, name: str, shard_lengths: Sequence[int] | None, layout: ShardLayout
) -> tuple[Tensor, list[Tensor]]:
    """Of this rank's rows, and of every rank's."""
    check_layout(layout)
    size = group_size(name)
    pieces = size * stretches_per_rank(layout)
    if shard_lengths is None:
        if seq_len % pieces:
            raise ValueError(
                f"shard_lengths: must be given where {pieces} stretches can't be equal, "
                f"got {seq_len} positions"
            )
        shard_lengths = (seq_len // pieces,) * pieces
    check_shard_lengths(shard_lengths, size, layout)
    if sum(shard_lengths) != seq_len:
        raise ValueError(
            f"shard_lengths: must add up to the sequence's {seq_len} positions, "
            f"got {list(shard_lengths)}"
        )
    positions = [*map(positions_of, shards(shard_lengths, layout))]
    return positions[rank_in(name)], positions
