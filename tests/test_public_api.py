"""The names, signatures and import paths that users rely on."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

import dilated_attention_pytorch as package
from dilated_attention_pytorch import ops

V2_ARGUMENTS = [
    "segment_lengths",
    "dilation_rates",
    "dropout",
    "ring_size",
    "device",
    "dtype",
    "use_pattern_cache",
]


def positional(function):
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def test_every_public_name_exists():
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert hasattr(package, name), name


@pytest.mark.parametrize("version", ["2", "3"])
def test_the_ring_modules_keep_their_import_paths(version):
    module = importlib.import_module(f"dilated_attention_pytorch.ring_dilated_attention_v{version}")
    name = f"RingDilatedAttentionV{version}"
    assert getattr(module, name) is getattr(package, name)


def test_the_function_is_not_shadowed_by_the_module_of_the_same_name():
    assert callable(package.dilated_attention)
    from dilated_attention_pytorch.dilated_attention import DilatedAttention

    assert DilatedAttention is package.DilatedAttention
    assert callable(package.dilated_attention)


def test_signatures():
    assert positional(package.RingDilatedAttentionV2) == V2_ARGUMENTS
    assert positional(package.RingDilatedAttentionV3) == [*V2_ARGUMENTS, "cache_on_gpu"]
    for name in ("RingDilatedAttentionV2", "RingDilatedAttentionV3"):
        forward = getattr(package, name).forward
        assert positional(forward) == ["self", "query", "key", "value", "is_causal"]
    assert positional(package.dilated_attention) == [
        "query",
        "key",
        "value",
        "segment_lengths",
        "dilation_rates",
    ]
    assert positional(package.dilated_attention_varlen) == [
        "query",
        "key",
        "value",
        "cu_seqlens",
        "segment_lengths",
        "dilation_rates",
    ]
    theirs = positional(torch.nn.MultiheadAttention.forward)
    assert positional(package.MultiheadDilatedAttention.forward) == theirs
    assert positional(package.create_dilated_attention) == ["attention_type"]
    assert positional(package.create_multihead_dilated_attention) == [
        "attention_type",
        "embed_dim",
        "num_heads",
        "segment_lengths",
        "dilation_rates",
    ]


def test_the_typed_operators_call_the_library():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 2, 4, generator=generator, dtype=torch.float64)
    packed = ops.gather(x, 8, 2, head_offsets=torch.tensor([1, 0]))
    assert torch.equal(packed[:, :, 0], x[:, 1::2, 0]) and torch.equal(
        packed[:, :, 1], x[:, ::2, 1]
    )
    sums = ops.scatter_add(x, packed, 8, 2, head_offsets=torch.tensor([1, 0]))
    assert torch.equal(sums[:, 1::2, 0], 2 * x[:, 1::2, 0])
    assert torch.equal(sums[:, ::2, 0], x[:, ::2, 0])
    out, lse = ops.segment_attention(x, x, x, 4, 2)
    several, lse_of_several = ops.attention(x, x, x, [4], [2])
    assert torch.equal(out, several) and torch.equal(lse, lse_of_several)
    block = (8, 0, 0, [4], [2])
    first = ops.attention_block(x, x[:, :3], x[:, :3], *block, partial=True)
    second = (x, x[:, 3:], x[:, 3:], 8, 0, 3, [4], [2])
    blocks = ops.attention_block(*second, out=first[0], lse=first[1])
    torch.testing.assert_close(blocks, (out, lse))
    gradients = ops.attention_backward(x, None, x, x, x, out, lse, [4], [2])
    shares = ops.attention_block_backward(x, None, x, x, x, out, lse, *block, partial=True)
    assert all(torch.equal(a, b) for a, b in zip(gradients, shares, strict=True))
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    expected = torch.autograd.grad(ops.attention(*leaves, [4], [2])[0], leaves, x)
    for actual, gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_importing_warns_of_nothing():
    code = "import dilated_attention_pytorch.ring_dilated_attention_v3"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd="/")
