"""torch.ops.dilated.attention_block and its backward: a step of a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from typing_extensions import Unpack

from .options import PatternOptions
from .typed import operator


@operator
def attention_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: int,
    queries: int | Sequence[int],
    keys: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    partial: bool = False,
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor]:
    """(out [B, Nq, H, D], lse [B, H, Nq]) of query over the keys of one block.

    queries: where the rows of query [B, Nq, H, D] lie in a sequence of seq_len: the first one's
    position, if they follow each other, or begin, end, begin, end, ... of stretches, in the
    sequence's order. keys: likewise of the rows of key and value [B, Nk, Hkv, D]. out and lse, both
    or neither, are the running result of other blocks of keys, as returned with partial=True; the
    softmax is then over their keys and these. After all blocks, in any order, it is `attention`'s.

    partial: out is returned in float32 (float64 for float64), to be continued; otherwise in query's
    dtype. A row that has attended to nothing so far has out 0 and lse -inf, and its running out is
    not read. padding="zeros" counts a row's zero keys in the block that holds the row's own
    position. Rows of key and value that no query would meet even without is_causal may hold
    anything. The remaining options are those of `attention`, with a pattern planned for these
    queries and keys. Not differentiable: call `attention_block_backward` yourself.

    Raises ValueError, naming the argument, where stretches leave the sequence, one of out and lse
    is missing or has another shape, dtype or device, or where `attention` would raise.
    """
    raise NotImplementedError


@operator
def attention_block_into(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    far_key: Tensor | None,
    far_value: Tensor | None,
    seq_len: int,
    queries: int | Sequence[int],
    keys: int | Sequence[int],
    far_keys: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    rows: Literal["all", "near", "far"] = "all",
    **options: Unpack[PatternOptions],
) -> None:
    """Writes rows of out [B, Nq, H, D] and lse [B, H, Nq], both contiguous: query over all keys of
    two pairs of tensors at once.

    far_key and far_value [B, Nf, Hkv, D] lie at positions far_keys, none of which are among keys;
    otherwise arguments are those of `attention_block`. rows: "near" writes the rows that meet no
    far key (if is_causal, none before them), "far" the others; each row of a head is one or the
    other, and rows that are not asked for stay as they are. For the near ones far_key and far_value
    may be None, as none is read. The gradients are those of two blocks, of near and of far keys.
    Not differentiable.

    Raises ValueError where `attention_block` does, or where near and far keys overlap.
    """
    raise NotImplementedError


@operator
def attention_block_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_len: int,
    queries: int | Sequence[int],
    keys: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    partial: bool = False,
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """One block's share of the gradients of query, key and value: their sum over all blocks is the
    gradient.

    out (in query's dtype) and lse are the final ones, over all blocks, and grad_out and grad_lse
    their gradients. partial: the shares come in float32 (float64 for float64), to be summed;
    otherwise in query's dtype. Raises ValueError as `attention_block` does.
    """
    raise NotImplementedError


@operator
def attention_block_backward_into(
    grad_query_sums: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_len: int,
    queries: int | Sequence[int],
    keys: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor]:
    """As `attention_block_backward`, partial, but adds the share of grad_query to sums in place.

    grad_query_sums: from `make_query_sums` before the first block of these queries. Its layout is
    private and depends on whether algorithms are deterministic; after the last block
    `round_query_sums` reads it. Returns grad_key and grad_value in float32 (float64 for float64).
    Not differentiable.
    """
    raise NotImplementedError


@operator
def make_query_sums(query: Tensor) -> Tensor:
    """Zeros [B, H, Nq, D rounded up to 16], to which blocks of query [B, Nq, H, D] add grad_query.

    In float32 (float64 for float64).
    """
    raise NotImplementedError


@operator
def round_query_sums(
    grad_query_sums: Tensor, query: Tensor, *, scale: float | None = None
) -> Tensor:
    """grad_query [B, Nq, H, D] in query's dtype, once all blocks are in the sums.

    scale: the one that the blocks were given.
    """
    raise NotImplementedError
