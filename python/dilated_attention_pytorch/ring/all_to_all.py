"""Heads for sequence: strategy "all_to_all".

Of the branches that cross ranks, each rank computes some heads for whole segments, as
`head_plan` divides them; rows travel to it and results back. What lies inside shards is computed
where it is, meanwhile. The parts are merged as branches always are, by their lse, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .block import Call, Gradients, Results, Running, attend, differentiate, wide_dtype
from .exchange import Peers
from .head_plan import HeadPlan, Part, Share, make_head_plan
from .lattice import Piece, Span
from .mail import Expected, Item, Mail
from .packing import Origin, gather_piece, scatter_piece

# Tensors [B, N, heads, D] of this rank's rows; True: their heads are the query's.
Rows = Sequence[tuple[Tensor, bool]]


def all_to_all_forward(
    call: Call, peers: Peers, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """(out in query's dtype, lse) of this rank's rows."""
    plan = make_head_plan(call.spec, call.shard_lengths, peers.rank)
    if not plan.shares:
        return attend(call, query, key, value, plan.rows, plan.rows, partial=False)
    given = ((query, True), (key, False), (value, False))
    mail = _send_rows(peers, plan, given)
    out, lse = _local_forward(call, plan, query, key, value)
    mail.wait()
    computed: dict[Share, list[tuple[Tensor, bool]]] = {}
    for share in plan.divided:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        q, k, v = _assemble(mail, plan, share, given)
        far_out, far_lse = attend(part, q, k, v, share.rows, share.rows, partial=False)
        computed[share] = [(far_out, True), (_as_rows(far_lse), True)]
    kinds = ((query, True), (_as_rows(lse), True))
    mail = _send_results(peers, plan, computed, kinds)
    mail.wait()
    for share, mine in plan.mine:
        for piece, *far in _results(mail, plan, share, mine, computed.get(share), kinds):
            _merge(out, lse, far[0], far[1], piece, (plan.rows[0], 0))
    return out.to(query.dtype), lse


def all_to_all_backward(
    call: Call, peers: Peers, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    """Gradients of this rank's query, key and value, in their dtype."""
    plan = make_head_plan(call.spec, call.shard_lengths, peers.rank)
    own = plan.rows
    if not plan.shares:
        return differentiate(call, query, key, value, results, own, own, partial=False)
    lse = _as_rows(results.lse)
    given = (
        *((query, True), (key, False), (value, False)),
        *((results.grad_out, True), (lse, True), (_logit_gradient(results), True)),
    )
    mail = _send_rows(peers, plan, given)
    grads = _local_backward(call, plan, query, key, value, results)
    mail.wait()
    computed: dict[Share, list[tuple[Tensor, bool]]] = {}
    for share in plan.divided:
        part = call.of_branches((share.branch,), share.query_heads, share.kv_heads)
        q, k, v, grad_out, *sums = _assemble(mail, plan, share, given)
        far_lse, far_grad_lse = (x.squeeze(3).transpose(1, 2).contiguous() for x in sums)
        # With out = 0 the gradient of lse is all that is subtracted from grad_out . value.
        far = Results(torch.zeros_like(q), far_lse, grad_out, far_grad_lse)
        shares = differentiate(part, q, k, v, far, share.rows, share.rows, partial=True)
        computed[share] = list(zip(shares, (True, False, False), strict=True))
    kinds = tuple(zip(grads, (True, False, False), strict=True))
    mail = _send_results(peers, plan, computed, kinds)
    mail.wait()
    for share, mine in plan.mine:
        _add(mail, plan, share, mine, computed.get(share), kinds)
    dtypes = (query.dtype, key.dtype, value.dtype)
    grad_query, grad_key, grad_value = (
        grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    )
    return grad_query, grad_key, grad_value


def _local_forward(
    call: Call, plan: HeadPlan, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """What lies inside the shard: branches that cross nothing, and whole segments of the others."""
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


def _local_backward(
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


def _logit_gradient(results: Results) -> Tensor:
    """[B, N, H, 1]: the gradient of lse, less the sum over a row of grad_out * out."""
    wide = results.lse.dtype
    sums = (results.grad_out.to(wide) * results.out.to(wide)).sum(3, keepdim=True)
    return -sums if results.grad_lse is None else _as_rows(results.grad_lse) - sums


def _send_rows(peers: Peers, plan: HeadPlan, given: Rows) -> Mail:
    """This rank's rows to those who compute with them, and theirs to this rank."""
    ranks = range(peers.size)
    outgoing = {
        peer: [
            Item(x, _pieces(part, is_query), (plan.rows[0], 0))
            for _, part in plan.outgoing(peer)
            for x, is_query in given
        ]
        for peer in ranks
    }
    incoming = {
        peer: [
            Expected(x, _pieces(part, is_query))
            for _, part in plan.incoming(peer)
            for x, is_query in given
        ]
        for peer in ranks
    }
    return Mail(peers, outgoing, incoming)


def _send_results(
    peers: Peers,
    plan: HeadPlan,
    computed: dict[Share, list[tuple[Tensor, bool]]],
    kinds: Rows,
) -> Mail:
    """What was computed here to those who own the rows. kinds: tensors like those to receive."""
    ranks = range(peers.size)
    outgoing = {
        peer: [
            Item(x, _pieces(part, is_query), _origin(share, is_query))
            for share, part in plan.incoming(peer)
            for x, is_query in computed[share]
        ]
        for peer in ranks
    }
    incoming = {
        peer: [
            Expected(x, _pieces(part, is_query))
            for _, part in plan.outgoing(peer)
            for x, is_query in kinds
        ]
        for peer in ranks
    }
    return Mail(peers, outgoing, incoming)


def _assemble(mail: Mail, plan: HeadPlan, share: Share, given: Rows) -> list[Tensor]:
    """The share's rows of each tensor, from this rank and the others; not on the lattice: any."""
    begin, end = share.rows
    result = []
    for x, is_query in given:
        heads = share.query_heads if is_query else share.kv_heads
        rows = x.new_empty(x.size(0), end - begin, heads[1] - heads[0], x.size(3))
        for part in share.parts:
            if part.rank == plan.rank:
                near = _slices(part.rows, plan.rows[0])
                rows[:, _slices(part.rows, begin)] = x[:, near, heads[0] : heads[1]]
            else:
                mail.take(part.rank, rows, _pieces(part, is_query), _origin(share, is_query))
        result.append(rows)
    return result


def _results(
    mail: Mail,
    plan: HeadPlan,
    share: Share,
    mine: Part,
    computed: Sequence[tuple[Tensor, bool]] | None,
    kinds: Rows,
) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """(piece, packed out, packed lse) of this rank's rows of a share."""
    columns = []
    for i, (like, _) in enumerate(kinds):
        if computed is None:
            columns.append([mail.next(share.owner, piece, like) for piece in mine.queries])
            continue
        packed = []
        for piece in mine.queries:
            shape = (like.size(0), piece.slots, piece.heads, like.size(3))
            packed.append(like.new_empty(shape))
            gather_piece(packed[-1], computed[i][0], piece, _origin(share, True))
        columns.append(packed)
    return zip(mine.queries, *columns, strict=True)


def _merge(
    out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor, piece: Piece, origin: Origin
) -> None:
    """(out, lse) <- the softmax over both's keys, at the rows of the piece."""
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
    computed: Sequence[tuple[Tensor, bool]] | None,
    grads: Rows,
) -> None:
    """Adds the gradients of this rank's rows of a share."""
    for i, (grad, is_query) in enumerate(grads):
        if computed is None:
            pieces, origin = _pieces(mine, is_query), (plan.rows[0], 0)
            mail.take(share.owner, grad, pieces, origin, accumulate=True)
        else:
            heads = share.query_heads if is_query else share.kv_heads
            near = _slices(mine.rows, plan.rows[0])
            far = computed[i][0][:, _slices(mine.rows, share.rows[0])]
            grad[:, near, heads[0] : heads[1]] += far


def _pieces(part: Part, is_query: bool) -> tuple[Piece, ...]:
    return part.queries if is_query else part.keys


def _origin(share: Share, is_query: bool) -> Origin:
    return share.rows[0], (share.query_heads if is_query else share.kv_heads)[0]


def _slices(rows: Span, begin: int) -> slice:
    return slice(rows[0] - begin, rows[1] - begin)


def _as_rows(lse: Tensor) -> Tensor:
    """[B, H, N] as rows of one number, [B, N, H, 1]; a view."""
    return lse.transpose(1, 2).unsqueeze(3)
