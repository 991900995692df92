"""What was attended to: the weights of some queries, and what each key receives from all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops
from .functional import check_scale
from .pattern import HeadOffsets, Padding, Scheme
from .pattern.bounds import at_least
from .pattern.plain import check_plain
from .pattern.row_keys import row_keys
from .ring import is_sharded, shards_of


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """The attention weights of some queries, one entry for each key that a row attends to.

    Row r = head * len(positions) + i is query `positions[i]` of a head; its entries are
    begins[r] .. begins[r + 1], by ascending key.

    Attributes:
        positions: the queries.
        begins: int64 [heads * len(positions) + 1].
        keys: int64 [entries].
        weights: [batch, entries], float32 (float64 for float64), differentiable.
    """

    positions: tuple[int, ...]
    begins: Tensor
    keys: Tensor
    weights: Tensor

    def row(self, head: int, index: int) -> tuple[Tensor, Tensor]:
        """(keys [n], weights [batch, n]) of query `positions[index]` in a head."""
        row = head * len(self.positions) + index
        entries = slice(int(self.begins[row]), int(self.begins[row + 1]))
        return self.keys[entries], self.weights[:, entries]

    def dense(self, seq_len: int) -> Tensor:
        """[batch, heads, len(positions), seq_len], 0 where a query does not attend."""
        batch, rows = len(self.weights), len(self.begins) - 1
        places = torch.arange(rows, device=self.keys.device) * seq_len
        places = places.repeat_interleave(self.begins.diff()) + self.keys
        dense = self.weights.new_zeros(batch, rows * seq_len).index_copy(1, places, self.weights)
        return dense.view(batch, -1, len(self.positions), seq_len)


def attention_weights(
    query: Tensor,
    key: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    positions: Sequence[int] | Tensor,
    head_offsets: HeadOffsets = "interleaved",
    is_causal: bool = False,
    scale: float | None = None,
    padding: Padding = "masked",
) -> AttentionWeights:
    """The weights with which some queries attend, as `dilated_attention` mixes the values by them.

    A key that several branches hold is one entry, with the weight of all of them. A row sums to 1;
    with padding="zeros" to less, by what its keys of score 0 take; a query that no branch holds has
    no entry. Time and memory grow with the entries. Differentiable.

    Args:
        query: [batch, seq_len, heads, head_dim], the whole sequence.
        key: [batch, seq_len, kv_heads, head_dim].
        positions: of the queries, integers from 0 on, in any order.
        segment_lengths, dilation_rates, head_offsets, is_causal, scale, padding: as in
            `dilated_attention`.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    scheme, options = _checked(
        query, key, segment_lengths, dilation_rates, head_offsets, is_causal, scale, padding
    )
    _, seq_len, heads, head_dim = query.shape
    rows = [at_least(0, p, "positions", seq_len) for p in _listed(positions)]
    offsets_of_head = list(zip(*scheme.offset_table(heads), strict=True))
    factor = options.get("scale", head_dim**-0.5)
    wide = torch.promote_types(query.dtype, torch.float32)
    empty = torch.empty(0, dtype=torch.int64, device=query.device)
    keys, weights = [empty], [query.new_empty(len(query), 0, dtype=wide)]
    lengths = [0]
    for head, offsets in enumerate(offsets_of_head):
        key_of_head = key[:, :, head // (heads // key.shape[2])]
        for p in rows:
            held = row_keys(
                seq_len, scheme.branches, offsets, p, is_causal=is_causal, padding=padding
            )
            at, counts = (x.to(query.device) for x in (held.positions, held.counts))
            one = query[:, p, head].to(wide) * factor
            scores = (key_of_head[:, at].to(wide) @ one[..., None])[..., 0] + counts.to(wide).log()
            zeros = math.log(held.zero_keys) if held.zero_keys else -math.inf
            total = torch.logaddexp(scores.logsumexp(1), scores.new_tensor(zeros))
            keys.append(at)
            weights.append((scores - total[:, None]).exp())
            lengths.append(len(at))
    begins = torch.tensor(lengths).cumsum(0).to(query.device)
    return AttentionWeights(tuple(rows), begins, torch.cat(keys), torch.cat(weights, 1))


def attention_mass(
    query: Tensor,
    key: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = "interleaved",
    is_causal: bool = False,
    scale: float | None = None,
    padding: Padding = "masked",
) -> Tensor:
    """What each key receives: its weights in all queries, summed up.

    Each query that is covered gives 1 in all, or less with padding="zeros". Costs a forward and a
    backward, and memory linear in seq_len. Not differentiable.

    Args:
        query: [batch, seq_len, heads, head_dim].
        key: [batch, seq_len, kv_heads, head_dim].
        segment_lengths, dilation_rates, head_offsets, is_causal, scale, padding: as in
            `dilated_attention`.

    Returns:
        [batch, heads, seq_len], float32 (float64 for float64). A sum of weights that are rounded to
        the inputs' dtype.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    if is_sharded(query, key):
        shards = shards_of(query=query, key=key)
        q, k = shards.rows
        whole = Scheme.make(segment_lengths, dilation_rates, head_offsets, padding)
        mass = attention_mass(
            q,
            k,
            segment_lengths,
            dilation_rates,
            head_offsets=whole.of_heads(query.shape[2], shards.first_head, q.shape[2]).head_offsets,
            is_causal=is_causal,
            scale=scale,
            padding=padding,
        )
        return shards.of_heads(mass)
    scheme, options = _checked(
        query, key, segment_lengths, dilation_rates, head_offsets, is_causal, scale, padding
    )
    branches = (scheme.segment_lengths, scheme.dilation_rates)
    seq_len, heads = query.shape[1:3]
    # A value's gradient is the sum of the weights that it got, each times its query's grad_out.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        query, key = query.detach(), key.detach()  # of forward derivatives, too
        rows = key.repeat_interleave(heads // key.shape[2], 2)  # a mass for each query head
        out, lse = ops.attention(query, rows, rows, *branches, **options)
        call = (torch.ones_like(query), None, query, rows, rows, out, lse)
        gradients = ops.attention_block_backward(
            *call, seq_len, 0, 0, *branches, partial=True, **options
        )
    return gradients[2][..., 0].transpose(1, 2)


def _checked(
    query: Tensor,
    key: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: HeadOffsets,
    is_causal: bool,
    scale: float | None,
    padding: Padding,
) -> tuple[Scheme, dict[str, Any]]:
    """The scheme and the operators' options, once the operator's own checks have passed."""
    for tensor, name in ((query, "query"), (key, "key")):
        check_plain(tensor, name)
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be [batch, seq_len, heads, head_dim], got shape {tuple(tensor.shape)}"
            )
    if is_causal is not True and is_causal is not False:
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    scheme = Scheme.make(segment_lengths, dilation_rates, head_offsets, padding)
    scale = check_scale(scale)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": padding}
    if scale is not None:
        options["scale"] = scale
    table = scheme.offset_table(query.shape[2])
    options["head_offsets"] = torch.tensor(table, dtype=torch.int64, device="cpu")
    q, k = query.detach().to("meta"), key.detach().to("meta")
    ops.attention(q, k, k, scheme.segment_lengths, scheme.dilation_rates, **options)
    return scheme, options


def _listed(positions: Sequence[int] | Tensor) -> list[int]:
    try:
        return list(positions.tolist() if isinstance(positions, Tensor) else positions)
    except TypeError:
        raise TypeError(f"positions must be a sequence of integers, got {positions!r}") from None
