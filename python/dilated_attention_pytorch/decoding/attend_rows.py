"""What a decode kernel will replace: queries over the rows that a cache keeps, in torch operations.

Each branch is a softmax over a prefix of its rows; the branches are merged by their denominators
(LongNet, arXiv 2307.02486, eq. 10), so a key that k of them hold counts k times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rows import BranchRows


def attend_rows(
    query: Tensor, branches: Sequence[BranchRows], entries: slice, begin: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [b, n, heads, head_dim], lse [b, heads, n]) of query, like out, at positions from
    `begin` on, over the rows of batch entries `entries`.

    These positions lie in one segment of every branch and their rows are stored already. out and
    lse are float32, float64 for float64; a query that no branch holds has out 0 and lse -inf.
    """
    batch, n, heads, _ = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = query.to(exact) * scale
    out = torch.zeros_like(query)
    lse = query.new_full((batch, heads, n), -torch.inf)
    for branch in branches:
        layout = branch.layout
        for lattice, members in zip(layout.lattices, branch.heads, strict=True):
            first, row, size = layout.places(lattice.offset, begin, begin + n)
            if size == 0:
                continue
            held = slice(first, None, layout.dilation_rate)
            buffers = slice(lattice.first, lattice.first + len(lattice.kv_heads))
            rows = (x[entries, buffers, : row + size].to(exact) for x in (branch.key, branch.value))
            new_out, new_lse = _softmax(query[:, held, members], *rows)
            _merge(out[:, held], lse[:, :, held], members, new_out, new_lse)
    return out, lse


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """(out like query, lse [b, heads, n]) of query [b, n, heads, D], already scaled, over key and
    value [b, buffers, rows, D]; the last query sees all rows, the one before it all but one.
    """
    batch, n, heads, head_dim = query.shape
    buffers, rows = key.shape[1:3]
    packed = query.transpose(1, 2).reshape(batch, buffers, -1, head_dim)
    scores = (packed @ key.transpose(2, 3)).view(batch, heads, n, rows)
    if n > 1:
        future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
        scores[..., rows - n :].masked_fill_(future, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_().view(batch, buffers, -1, rows)
    return (weights @ value).view(batch, heads, n, head_dim).transpose(1, 2), lse


def _merge(
    out: Tensor, lse: Tensor, heads: slice | Tensor, new_out: Tensor, new_lse: Tensor
) -> None:
    """Adds a branch of some heads to the running softmax, in place."""
    old_lse = lse[:, heads]
    both = torch.logaddexp(old_lse, new_lse)
    old, new = ((x - both).exp_().transpose(1, 2)[..., None] for x in (old_lse, new_lse))
    out[:, :, heads] = out[:, :, heads] * old + new_out * new
    lse[:, heads] = both
