"""The part of a call that lies inside this rank's shard, under strategy "all_to_all".

Branches that cross no ranks, as one pattern, and the other branches' segments that lie wholly in
the shard.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plans.head_plan import HeadPlan
from .call import Call, Gradients, Results, Running, attend, differentiate, wide_dtype


def local_forward(call: Call, plan: HeadPlan, query: Tensor, key: Tensor, value: Tensor) -> Running:
    """(out, lse) in float32 (float64 for float64), to be continued."""
    own, spec = plan.rows, call.spec
    if plan.whole:
        part = call.of_branches(plan.whole, (0, spec.heads), (0, spec.kv_heads))
        out, lse = attend(part, query, key, value, own, own, partial=True)
    else:
        batch, length, heads, _ = query.shape
        out = torch.zeros_like(query, dtype=wide_dtype(query.dtype))
        lse = out.new_full((batch, heads, length), -torch.inf)
    for share in plan.inner:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        rows = slice(share.rows[0] - own[0], share.rows[1] - own[0])
        running = (out[:, rows], lse[:, :, rows])
        q, k, v = query[:, rows], key[:, rows], value[:, rows]
        more = attend(part, q, k, v, share.rows, share.rows, running=running, partial=True)
        for whole, piece in zip(running, more, strict=True):
            whole.copy_(piece)
    return out, lse


def local_backward(
    call: Call, plan: HeadPlan, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    own, spec = plan.rows, call.spec
    if plan.whole:
        part = call.of_branches(plan.whole, (0, spec.heads), (0, spec.kv_heads))
        grads = differentiate(part, query, key, value, results, own, own, partial=True)
    else:
        wide = wide_dtype(query.dtype)
        q, k, v = (torch.zeros_like(x, dtype=wide) for x in (query, key, value))
        grads = (q, k, v)
    for share in plan.inner:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        rows = slice(share.rows[0] - own[0], share.rows[1] - own[0])
        grad_lse = results.grad_lse[:, :, rows] if results.grad_lse is not None else None
        sliced = Results(
            results.out[:, rows], results.lse[:, :, rows], results.grad_out[:, rows], grad_lse
        )
        q, k, v = query[:, rows], key[:, rows], value[:, rows]
        more = differentiate(part, q, k, v, sliced, share.rows, share.rows, partial=True)
        for whole, piece in zip(grads, more, strict=True):
            whole[:, rows] += piece
    return grads
