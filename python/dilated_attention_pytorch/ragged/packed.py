"""A padded or nested batch as rows and sequences, and results back in the batch's form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .jagged import like_jagged, of_jagged
from .lengths import SeqLens, of_padded
from .recall import Table


class Packed(NamedTuple):
    """Rows [1, T, H, D] of query, key and value, their sequences, and the query they came from."""

    rows: tuple[Tensor, Tensor, Tensor]
    sequences: Table
    query: Tensor

    def unpack(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [1, T, H, D] as query and lse [1, H, T] as [B, H, N], nested if query is."""
        if self.query.is_nested:
            nested_lse = like_jagged(lse.squeeze(0).t(), self.query).transpose(1, 2)
            return like_jagged(out.squeeze(0), self.query), nested_lse
        batch, seq_len, heads, _ = self.query.shape
        return out.view(self.query.shape), lse.view(heads, batch, seq_len).transpose(0, 1)


def pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_lens: SeqLens | None,
    whole_len: int | None = None,
) -> Packed | None:
    """The sequences of a batch that is nested or has seq_lens; None where no row has padding.

    whole_len: of the sequences, if the tensors hold a shard of each.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    if seq_lens is None:
        table = of_jagged(query, key, value)
        rows = query.values()[None], key.values()[None], value.values()[None]
        return Packed(rows, table, query)
    batch, seq_len = query.shape[:2]
    for x, name in ((query, "query"), (key, "key"), (value, "value")):
        if x.is_nested:
            raise ValueError(
                f"seq_lens must be None where {name} is nested, which has its own, got {seq_lens!r}"
            )
        if x.shape[:2] != (batch, seq_len):
            raise ValueError(
                f"{name} must have query's batch and seq_len, {batch} and {seq_len}, "
                f"got shape {tuple(x.shape)}"
            )
    sequences = of_padded(seq_lens, batch, seq_len if whole_len is None else whole_len)
    if sequences is None:
        return None
    q, k, v = (x.reshape(1, batch * seq_len, *x.shape[2:]) for x in (query, key, value))
    return Packed((q, k, v), sequences, query)
