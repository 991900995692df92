"""Who is measured over several ranks: our strategies, one GPU by itself, and two peers.

The peers are PyTorch's context parallel, which computes full attention (every pair of positions,
so far more work on long sequences), and an all-gather as in torchscale's sequence parallelism:
every rank gets the rows of all others in the branches that cross ranks, without overlap, and
attends with this library's kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.ring import Strategy
from dilated_attention_pytorch.ring.group.communicator import Communicator
from dilated_attention_pytorch.ring.group.transfer import Transfer
from dilated_attention_pytorch.ring.plans.lattice import Lattice, Piece, lattices
from dilated_attention_pytorch.ring.plans.plan import shards
from dilated_attention_pytorch.ring.strategies.packing import Packet, count_rows

from ..workloads import Workload
from . import full_attention_share, ours
from .calls import Calls, Inputs, UnsupportedError, autograd_calls

STRATEGIES = ("auto", "ring", "gather", "all_to_all")
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
        """This rank's rows."""
        begin, end = shards(self.shard_lengths)[self.group.rank()]
        whole = (*self.inputs.qkv, self.inputs.grad_out)
        return Inputs(*(x[:, begin:end].contiguous() for x in whole))

    def offsets(self) -> Tensor | None:
        if self.workload.head_offsets == "interleaved":
            return None
        return torch.tensor(self.workload.spec(self.is_causal).offset_table())


@dataclass(frozen=True, slots=True)
class Launches:
    """What is timed. `sent` counts the bytes that this rank has sent since it was made."""

    forward: Callable[[], object]
    both: Callable[[], object]
    sent: Callable[[], int]

    @staticmethod
    def of(calls: Calls, sent: Callable[[], int]) -> Launches:
        assert calls.both is not None
        return Launches(calls.forward, calls.both, sent)


def make_launches(name: str, case: Case) -> Launches:
    """Raises UnsupportedError if the peer can't compute this."""
    if name in STRATEGIES:
        return _ours(case, cast(Strategy, name))
    if name == SINGLE:  # every rank computes the whole sequence, by itself
        return Launches.of(ours(case.workload, case.is_causal, case.inputs), lambda: 0)
    return _all_gather(case) if name == ALL_GATHER else _context_parallel(case)


@contextlib.contextmanager
def without_exchange() -> Iterator[None]:
    """Our strategies exchange nothing and compute with whatever memory holds.

    The time that this saves is the exposed communication.
    """

    def nothing(*_: object) -> Transfer:
        return Transfer()

    with mock.patch.object(Communicator, "exchange", nothing):
        yield


def _ours(case: Case, strategy: Strategy) -> Launches:
    workload, offsets = case.workload, case.offsets()
    peers = Communicator(case.group.group_name)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.ring_attention(
            q,
            k,
            v,
            workload.segment_lengths,
            workload.dilation_rates,
            case.group.group_name,
            head_offsets=offsets,
            is_causal=case.is_causal,
            padding=workload.padding,
            shard_lengths=case.shard_lengths,
            strategy=strategy,
        )[0]

    return Launches.of(autograd_calls(forward, case.mine), lambda: peers.traffic.bytes_sent)


class _Gathered(torch.autograd.Function):
    """[B, n, H, D] of each rank -> [B, N, H, D] with the rows of the crossing branches."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: AllGather) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.reduce(grads[0]), None


class AllGather:
    """All ranks' rows of the branches that cross ranks, to all; and gradients back, in 16 bit."""

    def __init__(self, case: Case) -> None:
        self.case, self.bytes_sent = case, 0
        lengths, spec = case.shard_lengths, case.workload.spec(case.is_causal)
        if len(set(lengths)) > 1:
            raise UnsupportedError("shards must be equal")
        self.spans = shards(lengths)
        crossing = [x for x in lattices(spec) if x.segment_length > lengths[0]]
        if any(x.segment_length % lengths[0] for x in crossing if x.segment_length < spec.seq_len):
            raise UnsupportedError("segments must be whole shards")
        if case.workload.key_heads != case.workload.heads:
            raise UnsupportedError("KV heads must be as many as heads")
        self.pieces = [
            tuple(Piece(*span, x.rate, 0, _offsets(x, span[0])) for x in crossing)
            for span in self.spans
        ]
        self.repeated = (True,) * len(crossing)

    def gather(self, rows: Tensor) -> Tensor:
        batch, _, heads, head_dim = rows.shape
        rank, size = self.case.group.rank(), self.case.group.size()
        begin, end = self.spans[rank]
        whole = rows.new_empty(batch, self.case.workload.seq_len, heads, head_dim)
        if self.pieces[rank]:
            packet = Packet.empty(count_rows(self.pieces[rank]), batch, head_dim, rows)
            packet.put(rows, self.pieces[rank], (begin, 0))
            received = packet.data.new_empty(size * packet.data.numel())
            dist.all_gather_into_tensor(received, packet.data, group=self.case.group)
            self.bytes_sent += (size - 1) * packet.data.nbytes
            for part, pieces in zip(received.chunk(size), self.pieces, strict=True):
                Packet(part, batch).take(whole, pieces, (0, 0))
        whole[:, begin:end] = rows
        return whole

    def reduce(self, grad: Tensor) -> Tensor:
        batch, _, _, head_dim = grad.shape
        rank, size = self.case.group.rank(), self.case.group.size()
        begin, end = self.spans[rank]
        grad = grad.clone()
        result = None
        if self.pieces[rank]:
            packets = []
            for pieces in self.pieces:
                packets.append(Packet.empty(count_rows(pieces), batch, head_dim, grad))
                packets[-1].put_once(grad, pieces, self.repeated, (0, 0))
            sums = torch.empty_like(packets[rank].data)
            sent = torch.cat([packet.data for packet in packets])
            dist.reduce_scatter_tensor(sums, sent, group=self.case.group)
            self.bytes_sent += (size - 1) * sums.nbytes
            result = Packet(sums, batch)
        own = grad[:, begin:end].contiguous()
        if result is not None:
            result.take(own, self.pieces[rank], (begin, 0), accumulate=True)
        return own


def _offsets(lattice: Lattice, begin: int) -> tuple[int, ...]:
    """Of each head, in the segment that holds `begin`."""
    first = lattice.segment(begin)[0]
    return tuple((first + offset) % lattice.rate for offset in lattice.queries)


class _Block(torch.autograd.Function):
    """attention_block of this rank's queries over all positions."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, case: Case, begin: int) -> Tensor:
        out, lse = ops.attention_block(q, k, v, *_block_arguments(case, begin), **_block(case))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.case, ctx.begin = case, begin
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        case: Case = ctx.case
        saved = ctx.saved_tensors
        arguments = _block_arguments(case, ctx.begin)
        shares = ops.attention_block_backward(grads[0], None, *saved, *arguments, **_block(case))
        return (*shares, None, None)


_gathered: Callable[..., Tensor] = _Gathered.apply
_block_attention: Callable[..., Tensor] = _Block.apply


def _block_arguments(case: Case, begin: int) -> tuple[Any, ...]:
    workload = case.workload
    return (workload.seq_len, begin, 0, workload.segment_lengths, workload.dilation_rates)


def _block(case: Case) -> dict[str, Any]:
    return {
        "head_offsets": case.offsets(),
        "is_causal": case.is_causal,
        "padding": case.workload.padding,
    }


def _all_gather(case: Case) -> Launches:
    exchange = AllGather(case)
    begin = exchange.spans[case.group.rank()][0]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far_key, far_value = (_gathered(x, exchange) for x in (k, v))
        return _block_attention(q, far_key, far_value, case, begin)

    return Launches.of(autograd_calls(forward, case.mine), lambda: exchange.bytes_sent)


def _context_parallel(case: Case) -> Launches:
    """Full attention; [B, H, N, D]. Its ring sends all keys and values to all ranks."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel

    size, device = case.group.size(), case.inputs.query.device
    if case.workload.seq_len % (2 * size):
        raise UnsupportedError(f"seq_len must be a multiple of {2 * size}")
    if device.type != "cuda":
        raise UnsupportedError("only on GPUs: its ring has no kernels for the CPU")
    full_attention_share(case.workload, device.type, size)
    mesh = DeviceMesh.from_group(case.group, device.type)
    sent = [0]

    def shard(x: Tensor) -> Tensor:
        whole = x.transpose(1, 2).contiguous()
        with context_parallel(mesh, buffers=[whole], buffer_seq_dims=[2]):
            return whole.clone()

    tensors = [shard(x) for x in (*case.inputs.qkv, case.inputs.grad_out)]
    inputs = [x.requires_grad_() for x in tensors[:3]]
    steps = (size - 1) * (tensors[1].nbytes + tensors[2].nbytes)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.size(1) != k.size(1)
        sent[0] += steps
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.is_causal, enable_gqa=grouped
        )

    def ring() -> contextlib.AbstractContextManager[None]:
        """Attention goes round the mesh; at least one buffer has to be given."""
        unused = torch.empty(case.workload.seq_len, device=device)
        manager: contextlib.AbstractContextManager[None] = context_parallel(
            mesh, buffers=[unused], buffer_seq_dims=[0]
        )
        return manager

    def forward() -> Tensor:
        with torch.no_grad(), ring():
            return attend(*inputs)

    def both() -> tuple[Tensor, ...]:
        with ring():
            sent[0] += 3 * steps  # in the backward again, and their gradients in float32
            return torch.autograd.grad(attend(*inputs), inputs, tensors[3])

    return Launches(forward, both, lambda: sent[0])
