"""Calls an attention operator and the reference on the same input, and compares outputs and
gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.conftest import Exact
from tests.reference import dropout_keep, reference_attention

Tensors = tuple[Tensor, Tensor, Tensor]
HEAD_DIMS = [8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256]


class Result(NamedTuple):
    out: Tensor
    lse: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


@contextmanager
def deterministic_mode(enabled: bool = True) -> Iterator[None]:
    """torch.use_deterministic_algorithms: another backward path on GPUs, and NaN in new memory."""
    torch.use_deterministic_algorithms(enabled)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def output_gradients(query: Tensor, seed: int = 99) -> tuple[Tensor, Tensor]:
    """Normal gradients for out and lse, the same numbers on every device."""
    batch, seq_len, heads, _ = query.shape
    generator = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(query.shape, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn((batch, heads, seq_len), generator=generator, dtype=torch.float64)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return grad_out.to(query.device, query.dtype), grad_lse.to(query.device, lse_dtype)


def differentiate(
    outputs: tuple[Tensor, Tensor],
    inputs: Sequence[Tensor],
    gradients: tuple[Tensor, Tensor | None],
) -> Result:
    """Outputs and gradients; a gradient of None for lse leaves lse out of the loss."""
    used = [(o, g.to(o)) for o, g in zip(outputs, gradients, strict=True) if g is not None]
    grads = torch.autograd.grad([o for o, _ in used], inputs, [g for _, g in used])
    return Result(*(x.detach() for x in (*outputs, *grads)))


def run_operator(
    tensors: Tensors,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    with_grad_lse: bool = True,
    **options: Any,
) -> Result:
    """torch.ops.dilated.attention and its gradients."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    outputs = torch.ops.dilated.attention(*inputs, segment_lengths, dilation_rates, **options)
    grad_out, grad_lse = output_gradients(tensors[0])
    return differentiate(outputs, inputs, (grad_out, grad_lse if with_grad_lse else None))


def run_reference(
    tensors: Tensors,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    with_grad_lse: bool = True,
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> Result:
    """The same from the float64 definition, on the CPU."""
    inputs = [x.detach().to("cpu", torch.float64).requires_grad_() for x in tensors]
    batch, seq_len, heads, _ = inputs[0].shape
    if dropout_seed is not None:
        positions = (0, seq_len)
        options["keep"] = dropout_keep(
            int(dropout_seed), options["dropout_p"], batch, heads, positions, positions
        )
    outputs = reference_attention(*inputs, segment_lengths, dilation_rates, **options)
    grad_out, grad_lse = (x.cpu() for x in output_gradients(tensors[0]))
    return differentiate(outputs, inputs, (grad_out, grad_lse if with_grad_lse else None))


def assert_close(actual: Result, expected: Result, exact: Exact) -> None:
    """Within the tolerance of `exact`, relative to the largest number of each tensor (at least
    1); either may be on any device and in any dtype.
    """
    for name, ours, theirs in zip(Result._fields, actual, expected, strict=True):
        tolerance = exact.backward if name.startswith("grad") else exact.forward
        ours, theirs = (x.to("cpu", torch.float64) for x in (ours, theirs))
        finite = torch.isfinite(theirs)
        assert ours.shape == theirs.shape, name
        assert torch.equal(ours[~finite], theirs[~finite]), f"{name}: -inf in other places"
        if finite.any():
            size = max(1.0, theirs[finite].abs().max().item())
            error = (ours - theirs)[finite].abs().max().item() / size
            assert error <= tolerance, f"{name}: error {error:.2e}, tolerance {tolerance:.0e}"


def check_attention(
    tensors: Tensors,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    exact: Exact,
    **options: Any,
) -> Result:
    """Asserts that operator and reference agree, and returns the operator's result."""
    actual = run_operator(tensors, segment_lengths, dilation_rates, **options)
    expected = run_reference(tensors, segment_lengths, dilation_rates, **options)
    assert_close(actual, expected, exact)
    return actual
