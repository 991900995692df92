"""DTensors, sharded by batch and by heads, over two processes."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from dilated_attention_pytorch import (
    MultiheadDilatedAttention,
    attention_mass,
    attention_weights,
    dilated_attention,
    dilated_attention_varlen,
    ops,
)
from tests.conftest import missing_cuda
from tests.ring.processes import Failure, group_of

BRANCHES = ([8, 20], [1, 3])
LAYOUTS = {"heads": Shard(2), "batch": Shard(0), "replicated": Replicate()}


def mesh_of(size):
    return DeviceMesh.from_group(group_of(size), "cpu")


def rows(heads, kv_heads):
    generator = torch.Generator().manual_seed(1)
    sizes = [(3, 20, h, 4) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in sizes]


def results(inputs, options):
    """out, lse and gradients, with dropout that draws alike on every rank."""
    torch.manual_seed(5)
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*leaves, *BRANCHES, return_lse=True, **options)
    loss = out.square().sum() + lse.cos().sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def compare(size, layout, options):
    mesh, whole = mesh_of(size), rows(8, 4)
    sharded = [distribute_tensor(x, mesh, [LAYOUTS[layout]]) for x in whole]
    actual, expected = results(sharded, options), results(whole, options)
    assert all(isinstance(x, DTensor) for x in actual)
    torch.testing.assert_close([x.full_tensor() for x in actual], list(expected))
    return actual[0].to_local().shape == whole[0].shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head_offsets": "blocked", "is_causal": True, "scale": 0.3},
        {"dropout_p": 0.4},
        {"seq_lens": [13, 20, 7], "dropout_p": 0.4},
    ],
    ids=["plain", "blocked", "dropout", "lengths"],
)
def test_dtensors_are_attended_as_one_device_does(workers, layout, options):
    is_whole = workers.run(2, compare, layout, options)
    assert is_whole == [layout == "replicated"] * 2


def compare_on_a_gpu(size, layout, options):
    """Parts are cut by hand: gloo scatters no tensors of GPUs."""
    mesh = DeviceMesh.from_group(group_of(size), "cuda")
    whole = [x.to("cuda", torch.float32) for x in rows(8, 4)]
    placement = LAYOUTS[layout]

    def part(x, dim):
        return x if dim is None else x.chunk(size, dim)[mesh.get_rank()]

    dim = getattr(placement, "dim", None)
    sharded = [
        DTensor.from_local(part(x, dim), mesh, [placement], shape=x.shape, stride=x.stride())
        for x in whole
    ]
    out, lse, *gradients = results(sharded, options)
    expected, expected_lse, *expected_gradients = results(whole, options)
    torch.testing.assert_close(out.to_local(), part(expected, dim))
    torch.testing.assert_close(lse.to_local(), part(expected_lse, 1 if dim == 2 else dim))
    for x, y in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(x.to_local(), part(y, dim))


@pytest.mark.skipif(missing_cuda() is not None, reason=str(missing_cuda()))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.4}])
def test_dtensors_on_a_gpu(workers, layout, options):
    workers.run(2, compare_on_a_gpu, layout, options)


def compare_others(size):
    mesh, (query, key, value) = mesh_of(size), rows(8, 4)
    q, k, v = (distribute_tensor(x, mesh, [Shard(2)]) for x in (query, key, value))
    mass = attention_mass(q, k, *BRANCHES, is_causal=True)
    expected = attention_mass(query, key, *BRANCHES, is_causal=True)
    torch.testing.assert_close(mass.full_tensor(), expected)
    packed = [x.flatten(0, 1) for x in (query, key, value)]
    sharded = [distribute_tensor(x, mesh, [Shard(1)]) for x in packed]
    actual, lse = dilated_attention_varlen(*sharded, [0, 13, 60], *BRANCHES, return_lse=True)
    out, whole_lse = dilated_attention_varlen(*packed, [0, 13, 60], *BRANCHES, return_lse=True)
    torch.testing.assert_close(actual.full_tensor(), out)
    torch.testing.assert_close(lse.full_tensor(), whole_lse)
    uneven = [x[:, :, :3] for x in (query, query, query)]
    actual = dilated_attention(*(distribute_tensor(x, mesh, [Shard(2)]) for x in uneven), *BRANCHES)
    torch.testing.assert_close(actual.full_tensor(), dilated_attention(*uneven, *BRANCHES))


def test_maps_packed_batches_and_uneven_shards(workers):
    workers.run(2, compare_others)


def train_layer(size):
    mesh = mesh_of(size)
    torch.manual_seed(2)
    layer = MultiheadDilatedAttention(32, 8, *BRANCHES, num_kv_heads=4, layer_norm=False)
    layer.double()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    expected, _ = layer(x)
    expected.square().sum().backward()
    weights = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    columns = ColwiseParallel(use_local_output=False)
    plan = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "out_proj": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    actual, _ = layer(x)
    actual.square().sum().backward()
    return actual, expected, weights, layer


def compare_layer(size):
    actual, expected, weights, layer = train_layer(size)
    torch.testing.assert_close(actual, expected)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), weights[name])
    assert layer.q_proj.weight.to_local().shape == (16, 32)


def test_a_layer_whose_projections_are_parallel(workers):
    workers.run(2, compare_layer)


def refuse(size, call):
    mesh, (query, key, value) = mesh_of(size), rows(8, 4)
    q, k, v = (distribute_tensor(x, mesh, [Shard(2)]) for x in (query, key, value))
    calls = {
        "operator": lambda: ops.attention(q, k, v, *BRANCHES),
        "sequence": lambda: dilated_attention(
            *(distribute_tensor(x, mesh, [Shard(1)]) for x in (query, key, value)), *BRANCHES
        ),
        "mixed": lambda: dilated_attention(q, key, v, *BRANCHES),
        "mixed query": lambda: dilated_attention(query, k, v, *BRANCHES),
        "layouts": lambda: dilated_attention(
            q, distribute_tensor(key, mesh, [Replicate()]), v, *BRANCHES
        ),
        "groups": lambda: dilated_attention(
            *(distribute_tensor(x[:, :, :3], mesh, [Shard(2)]) for x in (query[:, :, ::2],)),
            *(distribute_tensor(x[:, :, :1], mesh, [Shard(2)]) for x in (key, value)),
            *BRANCHES,
        ),
        "group": lambda: dilated_attention(q, k, v, *BRANCHES, group=mesh),
        "weights": lambda: attention_weights(q, k, *BRANCHES, positions=[0]),
        "local": lambda: local_projections(mesh),
    }
    calls[call]()


def local_projections(mesh):
    layer = MultiheadDilatedAttention(32, 8, *BRANCHES)
    parallelize_module(
        layer, mesh, dict.fromkeys(["q_proj", "k_proj", "v_proj"], ColwiseParallel())
    )
    layer(torch.randn(1, 20, 32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("operator", "does not have a sharding strategy"),
        ("sequence", "query must be sharded by batch or heads, .* got .*Shard"),
        ("mixed", "key must be a DTensor where another of query, key, value is, got Tensor"),
        (
            "mixed query",
            "query must be a DTensor where another of .* is, got Tensor",
        ),
        ("layouts", "key must have query's mesh and placements"),
        ("groups", "key must have a head for each rank, got 1"),
        ("group", "query must be no DTensor where a group is given"),
        ("weights", "query must be a plain tensor, got a DTensor"),
        ("local", "q_proj must give .*embed_dim.*use_local_output=False"),
    ],
)
def test_what_is_refused(workers, call, message):
    with pytest.raises(Failure, match=message):
        workers.run(2, refuse, call)
