"""How a sequence is spread over a group: what functions and modules take, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pattern.scalars import index
from .arguments import check_rows, check_shard_lengths
from .group.process_group import Group, group_name, group_size, rank_in
from .plans.choose_strategy import Strategy, check_strategy
from .plans.layout import (
    ShardLayout,
    check_layout,
    count,
    equal_lengths,
    positions_of,
    shards,
)


@dataclass(frozen=True, slots=True)
class Sharding:
    """The group by its name, so that what holds it can be copied and pickled; see `make`."""

    group_name: str
    shard_lengths: tuple[int, ...] | None
    strategy: Strategy
    shard_layout: ShardLayout = "contiguous"

    @staticmethod
    def make(
        group: Group | None,
        shard_lengths: Sequence[int] | None,
        strategy: Strategy,
        shard_layout: ShardLayout = "contiguous",
    ) -> Sharding | None:
        """None without a group.

        Raises:
            TypeError: a group that is not one, lengths that are not integers.
            ValueError: lengths that are not one for each stretch, an unknown strategy or layout, or
                any of them without a group.
            RuntimeError: a name that no group of this process has.
        """
        check_strategy(strategy)
        check_layout(shard_layout)
        if group is None:
            if shard_lengths is not None:
                raise ValueError(
                    f"shard_lengths must be None where no group is given, got {shard_lengths!r}"
                )
            if strategy != "auto":
                raise ValueError(
                    f"strategy must be 'auto' where no group is given, got {strategy!r}"
                )
            if shard_layout != "contiguous":
                raise ValueError(
                    "shard_layout must be 'contiguous' where no group is given, "
                    f"got {shard_layout!r}"
                )
            return None
        name = group_name(group)
        try:
            lengths = None if shard_lengths is None else tuple(map(index, shard_lengths))
        except TypeError:
            raise TypeError(
                f"shard_lengths must be integers, one for each rank, got {shard_lengths!r}"
            ) from None
        # A compiler can't look a group up; the operator checks again when it runs.
        if not torch.compiler.is_compiling():
            size = group_size(name)
            if lengths is not None:
                check_shard_lengths(lengths, size, shard_layout)
        return Sharding(name, lengths, strategy, shard_layout)

    def lengths(self, rows: int) -> tuple[int, ...]:
        """Of all stretches, where this rank has so many rows.

        Raises ValueError if this rank should have others, or lengths are not given and can't be
        equal.
        """
        lengths = self.shard_lengths
        if lengths is None:
            return equal_lengths(rows, group_size(self.group_name), self.shard_layout)
        rank = rank_in(self.group_name)
        check_rows(count(shards(lengths, self.shard_layout)[rank]), rows, rank)
        return lengths

    def of_batch(self, rows: int, batch: int) -> Sharding:
        """The same for a batch's sequences one behind another, of each of which this rank has so
        many rows."""
        return replace(self, shard_lengths=self.lengths(rows) * batch)

    def positions(self, rows: int) -> Tensor:
        """int64 [rows]: of this rank's rows, where it has so many."""
        held = shards(self.lengths(rows), self.shard_layout)
        return positions_of(held[rank_in(self.group_name)])

    def extra_repr(self) -> str:
        """As a module prints it."""
        text = f"group={self.group_name!r}"
        if self.shard_lengths is not None:
            text += f", shard_lengths={list(self.shard_lengths)}"
        if self.strategy != "auto":
            text += f", strategy={self.strategy!r}"
        if self.shard_layout != "contiguous":
            text += f", shard_layout={self.shard_layout!r}"
        return text
