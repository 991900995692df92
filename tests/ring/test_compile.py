"""What torch does with the ring: opcheck, torch.compile, autocast, checkpointing, DDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import MultiheadDilatedAttention, dilated_attention
from dilated_attention_pytorch.ring import traffic
from tests.conftest import make_qkv
from tests.ring.processes import Processes, group_of

BRANCHES = ([16, 40], [1, 2])


def rows(rank: int, length: int = 20, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    tensors = make_qkv(80, 4, 8, kv_heads=2, dtype=dtype)
    return [x[:, rank * length : (rank + 1) * length].clone().requires_grad_() for x in tensors]


def loss_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    loss = function(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def check_operator(size: int) -> None:
    group = group_of(size)
    q, k, v = rows(group.rank())
    plain = [x.detach() for x in (q, k, v)]
    table = torch.tensor([[0] * 4, [0, 1, -1, 1]])
    seed = torch.tensor([11])
    name = group.group_name
    variants: list[dict[str, Any]] = [
        {},
        {"head_offsets": table, "is_causal": True, "scale": 0.3, "strategy": "ring"},
        {"dropout_p": 0.25, "dropout_seed": seed, "shard_lengths": [20] * size},
        {"padding": "zeros", "strategy": "all_to_all"},
        {"sequences": torch.tensor([[0, 17], [19, 13]]), "is_causal": True},
    ]
    for options in variants:
        forward = torch.ops.dilated.ring_attention
        torch.library.opcheck(forward.default, (q, k, v, *BRANCHES, name), options)
        out, lse = forward(*plain, *BRANCHES, name, **options)
        for grad_lse in (None, torch.ones_like(lse)):
            arguments = (out, grad_lse, *plain, out, lse, *BRANCHES, name)
            backward = torch.ops.dilated.ring_attention_backward.default
            torch.library.opcheck(backward, arguments, options)


def test_opcheck(workers: Processes) -> None:
    workers.run(2, check_operator)


def compile_and_compare(size: int, backend: str, kind: str) -> None:
    group = group_of(size)
    torch._dynamo.reset()
    argument: Any = {"group": group, "name": group.group_name}[kind]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = dilated_attention(
            q * 1.5, k, v, *BRANCHES, is_causal=True, return_lse=True, group=argument
        )
        return (out.sin() * q).sum() + lse.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = loss_and_gradients(function, rows(group.rank()))
    for ours, theirs in zip(
        loss_and_gradients(compiled, rows(group.rank())), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["group", "name"])
def test_compiled_equals_eager(workers: Processes, kind: str) -> None:
    workers.run(2, compile_and_compare, "aot_eager", kind)


def test_inductor_equals_eager(workers: Processes) -> None:
    workers.run(2, compile_and_compare, "inductor", "name")


def compile_a_batch(size: int) -> None:
    group = group_of(size)
    torch._dynamo.reset()
    name = group.group_name

    def function(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, *BRANCHES, group=name, seq_lens=seq_lens)
        return (out.sin() * q).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for lengths in ([20 * size, 33], [7, 20], [0, 20 * size]):  # one program
        seq_lens = torch.tensor(lengths)
        inputs = [torch.cat([x, x.flip(1)]).detach().requires_grad_() for x in rows(group.rank())]
        expected = loss_and_gradients(lambda *x, n=seq_lens: function(*x, n), inputs)
        actual = loss_and_gradients(lambda *x, n=seq_lens: compiled(*x, n), inputs)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def compile_a_layer(size: int) -> None:
    group = group_of(size)
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(32, 4, *BRANCHES, group=group.group_name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, seq_lens = torch.randn(2, 20, 32), torch.tensor([20 * size, 13])
    torch.testing.assert_close(
        compiled(x, seq_lens=seq_lens)[0], layer(x, seq_lens=seq_lens)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("function", [compile_a_batch, compile_a_layer])
def test_compiled_batches(workers: Processes, function: Callable[[int], None]) -> None:
    workers.run(2, function)


def compile_unused(size: int, backend: str) -> int:
    """Exchanges of a compiled function that uses the output on rank 0 only."""
    group = group_of(size)
    torch._dynamo.reset()
    is_used = group.rank() == 0
    name = group.group_name

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = torch.ops.dilated.ring_attention(q, k, v, *BRANCHES, name)
        return out.sum() if is_used else q.sum()

    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        before = traffic(group).exchanges
        compiled(*rows(group.rank()))
        return traffic(group).exchanges - before


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_call_with_unused_results_stays(workers: Processes, backend: str) -> None:
    assert workers.run(2, compile_unused, backend) == [1, 1]


def checkpointed(size: int, use_reentrant: bool) -> None:
    group = group_of(size)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, *BRANCHES, dropout_p=0.3, group=group)
        assert isinstance(out, Tensor)
        return out.square().sum()

    torch.manual_seed(group.rank())
    expected = loss_and_gradients(function, rows(group.rank()))
    torch.manual_seed(group.rank())
    inputs = rows(group.rank())
    loss = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    loss.backward()
    for x, theirs in zip(inputs, expected[1:], strict=True):
        assert torch.equal(x.grad, theirs)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(workers: Processes, use_reentrant: bool) -> None:
    workers.run(3, checkpointed, use_reentrant)


def autocast(size: int) -> None:
    group = group_of(size)
    inputs = rows(group.rank())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = dilated_attention(*inputs, *BRANCHES, return_lse=True, group=group)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    halves = [x.detach().bfloat16() for x in inputs]
    assert torch.equal(out, dilated_attention(*halves, *BRANCHES, group=group))
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in inputs)


def test_autocast(workers: Processes) -> None:
    workers.run(2, autocast)


def train_beside(size: int, wrapper: str) -> None:
    """Two replicas of a model, each with its sequence sharded over two ranks."""
    rank = dist.get_rank()
    rings = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    ring, everyone = rings[rank // 2], group_of(size)
    torch.manual_seed(0)
    model = Layer(ring)
    parallel: nn.Module = model
    if wrapper == "ddp":
        parallel = DistributedDataParallel(model, process_group=everyone)
    elif wrapper == "fsdp":
        fully_shard(model, mesh=DeviceMesh.from_group(everyone, "cpu"))
    else:  # parameters are sharded over the replicas, and each shard is on both ranks of a ring
        mesh = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("ring", "data"))
        model.group = mesh["ring"].get_group().group_name
        fully_shard(model, mesh=mesh)
    data = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(1))
    mine = data[rank // 2, rank % 2 * 20 :][None, :20]
    parallel(mine).square().sum().backward()

    torch.manual_seed(0)
    alone = Layer(None)
    sum(alone(x[None]).square().sum() for x in data).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        grad = ours.grad if wrapper == "ddp" else ours.grad.full_tensor()
        torch.testing.assert_close(grad * size, theirs.grad, rtol=1e-4, atol=1e-4)
    for group in (*rings, *replicas):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


class Layer(nn.Module):
    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)
        self.group = None if group is None else group.group_name

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(2, (3, 4, 8)).unbind(2)
        out = dilated_attention(q, k, v, [20, 40], [1, 2], is_causal=True, group=self.group)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "fsdp over a mesh"])
def test_two_rings_beside_ddp_and_fsdp(workers: Processes, wrapper: str) -> None:
    workers.run(4, train_beside, wrapper)


def interleave_groups(size: int) -> None:
    """Calls over two groups of the same ranks, and over one within the other, in turns."""
    rank = dist.get_rank()
    groups = [group_of(n) for n in (size, size - 1) if rank < n]
    expected = [dilated_attention(*rows(rank), *BRANCHES, group=group) for group in groups]
    for _ in range(3):
        for group, theirs in zip(groups, expected, strict=True):
            assert torch.equal(dilated_attention(*rows(rank), *BRANCHES, group=group), theirs)


def test_groups_in_turns(workers: Processes) -> None:
    workers.run(4, interleave_groups)
