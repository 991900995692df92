"""Strategy "all_to_all": sends rows to the ranks that compute with them, and results back.

Tensors are [B, N, heads, D], each with a flag: whether its heads are the query's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ..group.communicator import Communicator
from ..plans.head_plan import HeadPlan, Part, Share
from ..plans.lattice import Piece, Span
from .mail import Expected, Item, Mail
from .packing import Origin, gather_piece

Rows = Sequence[tuple[Tensor, bool]]


def send_rows(comm: Communicator, plan: HeadPlan, given: Rows) -> Mail:
    """Sends this rank's rows to the ranks that compute with them, and receives theirs."""
    ranks = range(comm.size)
    outgoing = {
        peer: [
            Item(x, pieces_of(part, is_query), (plan.rows[0], 0))
            for _, part in plan.outgoing(peer)
            for x, is_query in given
        ]
        for peer in ranks
    }
    incoming = {
        peer: [
            Expected(x, pieces_of(part, is_query))
            for _, part in plan.incoming(peer)
            for x, is_query in given
        ]
        for peer in ranks
    }
    return Mail(comm, outgoing, incoming)


def send_results(
    comm: Communicator,
    plan: HeadPlan,
    computed: Mapping[Share, Rows],
    kinds: Rows,
) -> Mail:
    """Sends what was computed here to the rows' owners, and receives what they computed.

    kinds: tensors like those to receive.
    """
    ranks = range(comm.size)
    outgoing = {
        peer: [
            Item(x, pieces_of(part, is_query), _origin(share, is_query))
            for share, part in plan.incoming(peer)
            for x, is_query in computed[share]
        ]
        for peer in ranks
    }
    incoming = {
        peer: [
            Expected(x, pieces_of(part, is_query))
            for _, part in plan.outgoing(peer)
            for x, is_query in kinds
        ]
        for peer in ranks
    }
    return Mail(comm, outgoing, incoming)


def assemble(mail: Mail, plan: HeadPlan, share: Share, given: Rows) -> list[Tensor]:
    """Each tensor's rows of a share, from all ranks; rows off the lattice are undefined."""
    begin, end = share.rows
    result = []
    for x, is_query in given:
        heads = share.query_heads if is_query else share.kv_heads
        rows = x.new_empty(x.size(0), end - begin, heads[1] - heads[0], x.size(3))
        for part in share.parts:
            if part.rank == plan.rank:
                near = shift(part.rows, plan.rows[0])
                rows[:, shift(part.rows, begin)] = x[:, near, heads[0] : heads[1]]
            else:
                mail.take(part.rank, rows, pieces_of(part, is_query), _origin(share, is_query))
        result.append(rows)
    return result


def packed_results(
    mail: Mail,
    plan: HeadPlan,
    share: Share,
    mine: Part,
    computed: Rows | None,
    kinds: Rows,
) -> Iterator[tuple[Piece, tuple[Tensor, ...]]]:
    """The pieces of this rank's rows of a share, each with the packed rows of every kind.

    All kinds have the query's heads.
    """
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
    return zip(mine.queries, zip(*columns, strict=True), strict=True)


def pieces_of(part: Part, is_query: bool) -> tuple[Piece, ...]:
    return part.queries if is_query else part.keys


def _origin(share: Share, is_query: bool) -> Origin:
    return share.rows[0], (share.query_heads if is_query else share.kv_heads)[0]


def shift(rows: Span, begin: int) -> slice:
    """Positions as rows of a tensor whose first row is position `begin`."""
    return slice(rows[0] - begin, rows[1] - begin)
