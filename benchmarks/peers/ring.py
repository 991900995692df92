"""Who is measured over several ranks: our strategies, one GPU by itself, and two peers.

The peers are PyTorch's context parallel, which computes full attention (every pair of positions,
so far more work on long sequences), and an all-gather as in torchscale's sequence parallelism:
every rank gets the rows of all others in the branches that cross ranks, without overlap, and
attends with this library's kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.ring import shard
from dilated_attention_pytorch.ring.group.communicator import Communicator
from dilated_attention_pytorch.ring.group.transfer import Transfer
from dilated_attention_pytorch.ring.plans.lattice import Lattice, Piece, lattices
from dilated_attention_pytorch.ring.plans.layout import shards, spans_of
from dilated_attention_pytorch.ring.strategies.packing import Packet, count_rows

from ..workloads import Workload
from . import full_attention_share, ours
from .calls import Calls, Inputs, Triple, UnsupportedError, autograd_calls, make_calls

ZIGZAG = ("zigzag-gather", "zigzag-ring")
STRATEGIES = ("auto", "ring", "gather", "all_to_all", *ZIGZAG)
SINGLE, ALL_GATHER, CONTEXT_PARALLEL = "one-rank", "all-gather", "torch-context-parallel"
NAMES = (*STRATEGIES, SINGLE, ALL_GATHER, CONTEXT_PARALLEL)


@dataclass(frozen=True, slots=True)
class Case:
    """A workload over the ranks of a group; `inputs` are the whole sequence's, on every rank."""

    workload: Workload
    is_causal: bool
    inputs: Inputs
    group: dist.ProcessGroup

    @property
    def shard_lengths(self) -> tuple[int, ...]:
        length, size = self.workload.seq_len, self.group.size()
        cuts = [length * i // size for i in range(size + 1)]
        return tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))

    @property
    def mine(self) -> Inputs:
        """This rank's rows, contiguous."""
        begin, end = shards(self.shard_lengths)[self.group.rank()]
        return Inputs(*(x[:, begin:end].contiguous() for x in self.inputs.all))

    def zigzag(self) -> Inputs:
        """Its rows of 2P equal stretches."""
        layout: Any = {"shard_layout": "zigzag"}
        return Inputs(*(shard(x, self.group, **layout) for x in self.inputs.all))

    @property
    def options(self) -> dict[str, Any]:
        """Of the operators."""
        offsets = torch.tensor(self.workload.spec(self.is_causal).offset_table())
        shared = {"is_causal": self.is_causal, "padding": self.workload.padding}
        return {"head_offsets": offsets, **shared}


def prepare(name: str, case: Case) -> Calls:
    """Raises UnsupportedError if the peer can't compute this."""
    if name in ZIGZAG and not case.is_causal:
        raise UnsupportedError("zigzag is for causal work")
    if name in STRATEGIES:
        return _ours(case, name)
    if name == SINGLE:  # every rank computes the whole sequence, by itself
        return ours(case.workload, case.is_causal, case.inputs)
    return _all_gather(case) if name == ALL_GATHER else _context_parallel(case)


def without_exchange() -> contextlib.AbstractContextManager[object]:
    """Our strategies exchange nothing and compute with whatever memory holds.

    The time that this saves is the exposed communication.
    """
    return mock.patch.object(Communicator, "exchange", lambda *_: Transfer())


def _ours(case: Case, name: str) -> Calls:
    branches = (case.workload.segment_lengths, case.workload.dilation_rates)
    layout: dict[str, Any] = {"shard_lengths": case.shard_lengths}
    if name in ZIGZAG:
        layout = {"shard_layout": "zigzag"}
    options = {**case.options, **layout, "strategy": name.removeprefix("zigzag-")}
    group = case.group.group_name

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.ring_attention(q, k, v, *branches, group, **options)[0]

    sent = Communicator(group).traffic
    mine = case.zigzag() if name in ZIGZAG else case.mine
    return replace(autograd_calls(forward, mine), sent=lambda: sent.bytes_sent)


class AllGather:
    """All ranks' rows of the branches that cross ranks, to all; and gradients back, in 16 bit."""

    def __init__(self, case: Case) -> None:
        self.case, self.bytes_sent = case, 0
        workload, lengths = case.workload, case.shard_lengths
        if len(set(lengths)) > 1:
            raise UnsupportedError("shards must be equal")
        spec = workload.spec(case.is_causal)
        crossing = [x for x in lattices(spec) if x.segment_length > lengths[0]]
        if any(x.segment_length % lengths[0] for x in crossing if x.segment_length < spec.seq_len):
            raise UnsupportedError("segments must be whole shards")
        if workload.key_heads != workload.heads:
            raise UnsupportedError("KV heads must be as many as heads")
        spans = spans_of(lengths)
        self.pieces = [
            tuple(Piece(*span, x.rate, 0, _offsets(x, span[0])) for x in crossing) for span in spans
        ]
        self.rank, self.size = case.group.rank(), case.group.size()
        self.begin, self.end = spans[self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """[B, n, H, D] of each rank -> [B, N, H, D] with the rows of the crossing branches."""
        batch, _, heads, head_dim = rows.shape
        whole = rows.new_empty(batch, self.case.workload.seq_len, heads, head_dim)
        mine = self.pieces[self.rank]
        if mine:
            packet = Packet.empty(count_rows(mine), batch, head_dim, rows)
            packet.put(rows, mine, (self.begin, 0))
            received = packet.data.new_empty(self.size * packet.data.numel())
            dist.all_gather_into_tensor(received, packet.data, group=self.case.group)
            self.bytes_sent += (self.size - 1) * packet.data.nbytes
            for part, pieces in zip(received.chunk(self.size), self.pieces, strict=True):
                Packet(part, batch).take(whole, pieces, (0, 0))
        whole[:, self.begin : self.end] = rows
        return whole

    def reduce(self, grad: Tensor) -> Tensor:
        """The sum of all ranks' gradients of this rank's rows."""
        batch, _, _, head_dim = grad.shape
        mine = self.pieces[self.rank]
        if not mine:
            return grad[:, self.begin : self.end].contiguous()
        grad, packets = grad.clone(), []
        for pieces in self.pieces:
            packets.append(Packet.empty(count_rows(pieces), batch, head_dim, grad))
            packets[-1].put_once(grad, pieces, (True,) * len(pieces), (0, 0))
        sums = torch.empty_like(packets[self.rank].data)
        sent = torch.cat([packet.data for packet in packets])
        dist.reduce_scatter_tensor(sums, sent, group=self.case.group)
        self.bytes_sent += (self.size - 1) * sums.nbytes
        own = grad[:, self.begin : self.end].contiguous()
        Packet(sums, batch).take(own, mine, (self.begin, 0), accumulate=True)
        return own


def _offsets(lattice: Lattice, begin: int) -> tuple[int, ...]:
    """Of each head, in the segment that holds `begin`."""
    first = lattice.segment(begin)[0]
    return tuple((first + offset) % lattice.rate for offset in lattice.queries)


def _all_gather(case: Case) -> Calls:
    """This rank's queries over all positions."""
    peer, mine, options = AllGather(case), case.mine, case.options
    workload = case.workload
    branches = (workload.segment_lengths, workload.dilation_rates)
    where = (workload.seq_len, peer.begin, 0, *branches)

    def attend() -> list[Tensor]:
        """Far keys and values, out, lse."""
        far = [peer.gather(mine.key), peer.gather(mine.value)]
        arguments: tuple[Any, ...] = (mine.query, *far, *where)
        return [*far, *ops.attention_block(*arguments, **options)]

    def gradients(saved: list[Tensor], _: bool) -> Triple:
        arguments: tuple[Any, ...] = (mine.grad_out, None, mine.query, *saved, *where)
        query, key, value = ops.attention_block_backward(*arguments, **options)
        return query, peer.reduce(key), peer.reduce(value)

    calls = make_calls(lambda: attend()[2], attend, gradients)
    return replace(calls, sent=lambda: peer.bytes_sent)


def _context_parallel(case: Case) -> Calls:
    """Full attention; [B, H, N, D]. Its ring sends all keys and values to all ranks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    size, device = case.group.size(), case.inputs.query.device
    if device.type != "cuda":
        raise UnsupportedError("only on GPUs: its ring has no kernels for the CPU")
    full_attention_share(case.workload, device.type, size)
    mesh = DeviceMesh.from_group(case.group, device.type)
    sent = [0]

    def shard(x: Tensor) -> Tensor:
        whole = x.transpose(1, 2).contiguous()
        with context_parallel(mesh, buffers=[whole], buffer_seq_dims=[2]):
            return whole.clone()

    inputs = Inputs(*map(shard, case.inputs.all))
    steps = (size - 1) * (inputs.key.nbytes + inputs.value.nbytes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sent[0] += steps
        attention = functional.scaled_dot_product_attention
        return attention(q, k, v, is_causal=case.is_causal, enable_gqa=q.size(1) != k.size(1))

    calls = autograd_calls(attend, inputs)

    def within(call: Any, more: int = 0) -> Callable[[], Any]:
        def run() -> Any:
            sent[0] += more
            unused = torch.empty(case.workload.seq_len, device=device)  # one has to be given
            with context_parallel(mesh, buffers=[unused], buffer_seq_dims=[0]):
                return call()

        return run

    # Of the backward: keys and values again, and their gradients in float32.
    both = within(calls.both, 3 * steps)
    return Calls(within(calls.forward), None, both, sent=lambda: sent[0])
