"""attention reads and returns tensors of any strides, and of no rows."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Exact, make_qkv
from tests.ops.calls import Result, output_gradients, run_operator


@pytest.mark.parametrize(
    "layout", ["transposed", "packed qkv", "expanded batch", "last dim", "poison"]
)
def test_strided_inputs(layout: str, device: str, exact: Exact) -> None:
    tensors = make_qkv(75, 4, 24, batch=2, dtype=exact.dtype, device=device)
    if layout == "transposed":  # [B, H, N, D] in memory
        strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    elif layout == "packed qkv":
        strided = torch.stack(tensors, dim=2).unbind(2)
    elif layout == "expanded batch":
        tensors = tuple(x[:1].expand(2, -1, -1, -1).contiguous() for x in tensors)
        strided = tuple(x[:1].expand(2, -1, -1, -1) for x in tensors)
    elif layout == "last dim":  # the last dimension has a stride of 2
        strided = tuple(torch.stack((x, x + 1), dim=-1)[..., 0] for x in tensors)
    else:
        strided = make_qkv(75, 4, 24, batch=2, dtype=exact.dtype, device=device, poison=True)
    assert all(torch.equal(a, b) for a, b in zip(strided, tensors, strict=True))
    expected = run_operator(tensors, [16, 50], [1, 2])
    assert not strided[1].is_contiguous()
    actual = run_operator(strided, [16, 50], [1, 2])
    for name, ours, theirs in zip(Result._fields, actual, expected, strict=True):
        assert torch.equal(ours, theirs), name


def test_strided_output_gradient(device: str, exact: Exact) -> None:
    tensors = make_qkv(60, 4, 16, dtype=exact.dtype, device=device)
    expected = run_operator(tensors, [16], [1])
    inputs = [x.detach().requires_grad_() for x in tensors]
    out, lse = torch.ops.dilated.attention(*inputs, [16], [1])
    grad_out, grad_lse = output_gradients(tensors[0])
    strided = grad_out.transpose(1, 3).contiguous().transpose(1, 3)
    assert not strided.is_contiguous()
    grads = torch.autograd.grad((out, lse), inputs, (strided, grad_lse.mT.contiguous().mT))
    for ours, theirs in zip(grads, expected[2:], strict=True):
        assert torch.equal(ours, theirs)


def test_expanded_output_gradient(device: str, exact: Exact) -> None:
    # sum() sends a gradient of strides 0.
    tensors = make_qkv(60, 4, 16, dtype=exact.dtype, device=device, requires_grad=True)
    out, _ = torch.ops.dilated.attention(*tensors, [16], [1])
    expected = torch.autograd.grad(out, tensors, torch.ones_like(out), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), tensors), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (0, 0)])
def test_empty_batch_and_empty_sequence(shape: tuple[int, int], device: str, exact: Exact) -> None:
    batch, seq_len = shape
    tensors = make_qkv(seq_len, 4, 16, batch=batch, kv_heads=2, dtype=exact.dtype, device=device)
    result = run_operator(tensors, [8, 16], [1, 2])
    assert result.out.shape == (batch, seq_len, 4, 16)
    assert result.lse.shape == (batch, 4, seq_len)
    assert result.grad_query.shape == tensors[0].shape
    assert result.grad_key.shape == result.grad_value.shape == tensors[1].shape


def test_inputs_are_left_alone(device: str, exact: Exact) -> None:
    tensors = make_qkv(50, 4, 16, dtype=exact.dtype, device=device)
    before = [x.clone() for x in tensors]
    run_operator(tensors, [8, 32], [1, 2])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
