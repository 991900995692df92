"""Heads for sequence: strategy "all_to_all".

Of the branches that cross ranks, each rank computes some heads for whole segments, as `head_plan`
divides them: rows travel to it, and results back. Meanwhile each rank computes what lies inside its
shard. The parts are merged as branches always are, by their lse, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..group.communicator import Communicator
from ..plans.head_plan import HeadPlan, Part, Share, make_head_plan
from ..plans.lattice import Piece
from .call import Call, Gradients, Results, Running, Where, attend, differentiate
from .local import local_backward, local_forward
from .mail import Mail
from .packing import Origin, gather_piece, scatter_piece
from .redistribution import (
    Rows,
    assemble,
    packed_results,
    pieces_of,
    send_results,
    send_rows,
    shift,
)


def plan_all_to_all(call: Call, rank: int) -> None:
    """Plans all blocks of a rank; raises ValueError where that can't be done."""
    plan = make_head_plan(call.spec, call.shard_lengths, rank)
    spec = call.spec
    if not plan.shares:
        call.plan(Where(plan.rows, plan.rows))
    elif plan.whole:
        whole = call.of_branches(plan.whole, (0, spec.heads), (0, spec.kv_heads))
        whole.plan(Where(plan.rows, plan.rows))
    for share in plan.own:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        part.plan(Where(share.rows, share.rows))


def all_to_all_forward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """(out in query's dtype, lse) of this rank's rows."""
    plan = make_head_plan(call.spec, call.shard_lengths, comm.rank)
    if not plan.shares:
        return attend(call, query, key, value, plan.rows, plan.rows, partial=False)
    given = ((query, True), (key, False), (value, False))
    mail = send_rows(comm, plan, given)
    out, lse = local_forward(call, plan, query, key, value)
    mail.wait()
    computed: dict[Share, Rows] = {}
    for share in plan.divided:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        q, k, v = assemble(mail, plan, share, given)
        far_out, far_lse = attend(part, q, k, v, share.rows, share.rows, partial=False)
        computed[share] = [(far_out, True), (_as_rows(far_lse), True)]
    kinds = ((query, True), (_as_rows(lse), True))
    mail = send_results(comm, plan, computed, kinds)
    mail.wait()
    for share, mine in plan.mine:
        results = packed_results(mail, plan, share, mine, computed.get(share), kinds)
        for piece, (far_out, far_lse) in results:
            _merge(out, lse, far_out, far_lse, piece, (plan.rows[0], 0))
    return out.to(query.dtype), lse


def all_to_all_backward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    """Gradients of this rank's query, key and value, in their dtype."""
    plan = make_head_plan(call.spec, call.shard_lengths, comm.rank)
    own = plan.rows
    if not plan.shares:
        return differentiate(call, query, key, value, results, own, own, partial=False)
    lse = _as_rows(results.lse)
    given = (
        *((query, True), (key, False), (value, False)),
        *((results.grad_out, True), (lse, True), (_logit_gradient(results), True)),
    )
    mail = send_rows(comm, plan, given)
    grads = local_backward(call, plan, query, key, value, results)
    mail.wait()
    computed: dict[Share, Rows] = {}
    for share in plan.divided:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        q, k, v, grad_out, *sums = assemble(mail, plan, share, given)
        far_lse, far_grad_lse = (x.squeeze(3).transpose(1, 2).contiguous() for x in sums)
        # With out = 0, delta is -grad_lse, which carries the sum of grad_out * out as well.
        far = Results(torch.zeros_like(q), far_lse, grad_out, far_grad_lse)
        shares = differentiate(part, q, k, v, far, share.rows, share.rows, partial=True)
        computed[share] = list(zip(shares, (True, False, False), strict=True))
    kinds = tuple(zip(grads, (True, False, False), strict=True))
    mail = send_results(comm, plan, computed, kinds)
    mail.wait()
    for share, mine in plan.mine:
        _add(mail, plan, share, mine, computed.get(share), kinds)
    dtypes = (query.dtype, key.dtype, value.dtype)
    grad_query, grad_key, grad_value = (
        grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return grad_query, grad_key, grad_value


def _logit_gradient(results: Results) -> Tensor:
    """[B, N, H, 1]: the gradient of lse, less the sum over a row of grad_out * out."""
    wide = results.lse.dtype
    sums = (results.grad_out.to(wide) * results.out.to(wide)).sum(3, keepdim=True)
    return -sums if results.grad_lse is None else _as_rows(results.grad_lse) - sums


def _merge(
    out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor, piece: Piece, origin: Origin
) -> None:
    """(out, lse) <- the softmax over the keys of both, at the rows of the piece."""
    near_out = torch.empty_like(far_out, dtype=out.dtype)
    near_lse = torch.empty_like(far_lse)
    gather_piece(near_out, out, piece, origin)
    gather_piece(near_lse, _as_rows(lse), piece, origin)
    total = torch.logaddexp(near_lse, far_lse)
    shift = total.masked_fill(total == -torch.inf, 0.0)
    merged = near_out * (near_lse - shift).exp() + far_out * (far_lse - shift).exp()
    scatter_piece(out, merged, piece, origin)
    scatter_piece(_as_rows(lse), total, piece, origin)


def _add(
    mail: Mail,
    plan: HeadPlan,
    share: Share,
    mine: Part,
    computed: Rows | None,
    grads: Rows,
) -> None:
    """Adds the gradients of this rank's rows of a share."""
    for i, (grad, is_query) in enumerate(grads):
        if computed is None:
            pieces, origin = pieces_of(mine, is_query), (plan.rows[0], 0)
            mail.take(share.owner, grad, pieces, origin, accumulate=True)
        else:
            heads = share.query_heads if is_query else share.kv_heads
            near = shift(mine.rows, plan.rows[0])
            far = computed[i][0][:, shift(mine.rows, share.rows[0])]
            grad[:, near, heads[0] : heads[1]] += far


def _as_rows(lse: Tensor) -> Tensor:
    """[B, H, N] as rows of one number, [B, N, H, 1]; a view."""
    return lse.transpose(1, 2).unsqueeze(3)
