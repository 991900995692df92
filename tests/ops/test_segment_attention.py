"""segment_attention is attention with one branch."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Exact, make_qkv
from tests.ops.calls import (
    assert_close,
    differentiate,
    output_gradients,
    run_operator,
    run_reference,
)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize(("length", "rate"), [(16, 1), (16, 3), (10**6, 4), (7, 9)])
def test_equals_reference_and_attention(
    length: int, rate: int, padding: str, is_causal: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(75, 4, 16, batch=2, kv_heads=2, dtype=exact.dtype, device=device)
    inputs = [x.detach().requires_grad_() for x in tensors]
    options = {"is_causal": is_causal, "padding": padding}
    outputs = torch.ops.dilated.segment_attention(*inputs, length, rate, **options)
    result = differentiate(outputs, inputs, output_gradients(tensors[0]))
    assert_close(result, run_reference(tensors, [length], [rate], **options), exact)
    one_branch = run_operator(tensors, [length], [rate], **options)
    assert all(torch.equal(a, b) for a, b in zip(result, one_branch, strict=True))


def test_offsets_scale_and_dropout_are_passed_on(device: str, exact: Exact) -> None:
    tensors = make_qkv(40, 4, 16, dtype=exact.dtype, device=device)
    options = {
        "head_offsets": torch.tensor([[2, 0, -1, 1]]),
        "scale": 0.7,
        "dropout_p": 0.25,
        "dropout_seed": torch.tensor([5], device=device),
    }
    inputs = [x.detach().requires_grad_() for x in tensors]
    outputs = torch.ops.dilated.segment_attention(*inputs, 20, 3, **options)
    result = differentiate(outputs, inputs, output_gradients(tensors[0]))
    assert_close(result, run_reference(tensors, [20], [3], **options), exact)


def test_branches_merged_by_their_log_sum_exps_are_attention(device: str, exact: Exact) -> None:
    # The paper's equation 10, literally.
    tensors = make_qkv(100, 4, 16, dtype=exact.dtype, device=device)
    branches = [(16, 1), (40, 2), (100, 4)]
    parts = [torch.ops.dilated.segment_attention(*tensors, w, r) for w, r in branches]
    lses = torch.stack([lse for _, lse in parts])
    weights = lses.softmax(0).transpose(2, 3)[..., None]
    mixed = sum(weight * out for weight, (out, _) in zip(weights, parts, strict=True))
    lengths, rates = zip(*branches, strict=True)
    out, lse = torch.ops.dilated.attention(*tensors, lengths, rates)
    torch.testing.assert_close(mixed, out, rtol=0, atol=exact.forward)
    torch.testing.assert_close(lses.logsumexp(0), lse, rtol=0, atol=exact.forward)
