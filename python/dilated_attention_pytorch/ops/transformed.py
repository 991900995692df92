"""`attention` under torch.func's transforms (grad, vmap, jacrev), which C++ autograd does not know.

What vmap maps over joins the batch, one call in all; a call each where the batch entry counts, in
dropout and in lists of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from .attention import attention, attention_backward

_FIRST_ONLY = (
    "dilated attention has first derivatives in reverse mode, and no others: "
    "neither forward mode (jvp, jacfwd) nor a derivative of its gradients (hessian)"
)


@dataclass(frozen=True, slots=True)
class Call:
    """segment_lengths, dilation_rates, and `attention`'s options but dropout_seed."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    options: dict[str, Any]

    @property
    def is_foldable(self) -> bool:
        return self.options.get("sequences") is None and "dropout_p" not in self.options


def attention_in_transform(
    query: Tensor, key: Tensor, value: Tensor, call: Call, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attention`'s results; raises NotImplementedError for derivatives that are not there."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    out, lse = _applied(_Attention, query, key, value, dropout_seed, call)
    return out, lse


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise NotImplementedError(_FIRST_ONLY)


class _Attention(_FirstOnly):
    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        branches = (call.segment_lengths, call.dilation_rates)
        return attention(query, key, value, *branches, dropout_seed=seed, **call.options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, seed, out, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        inputs = (grad_out, grad_lse, query, key, value, out, lse, seed, ctx.call)
        return *_applied(_Gradients, *inputs), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _mapped(_Attention, info.batch_size, in_dims, inputs)


class _Gradients(_FirstOnly):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, grad_lse, query, key, value, out, lse, seed, call = inputs
        return attention_backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            out,
            lse,
            call.segment_lengths,
            call.dilation_rates,
            dropout_seed=seed,
            **call.options,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(_FIRST_ONLY)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _mapped(_Gradients, info.batch_size, in_dims, inputs)


def _mapped(
    function: type[torch.autograd.Function],
    size: int,
    in_dims: tuple[int | None, ...],
    inputs: tuple[Any, ...],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The results for all that is mapped over, and that it is their first dimension."""
    *tensors, call = inputs
    dims = in_dims[:-1]
    if call.is_foldable:
        folded = (_folded(x, dim, size) for x, dim in zip(tensors, dims, strict=True))
        results = _applied(function, *folded, call)
        return tuple(x.view(size, len(x) // size, *x.shape[1:]) for x in results), (0,) * len(
            results
        )
    each = [
        _applied(function, *(_chosen(x, d, i) for x, d in zip(tensors, dims, strict=True)), call)
        for i in range(size)
    ]
    stacked = tuple(torch.stack(xs) for xs in zip(*each, strict=True))
    return stacked, (0,) * len(stacked)


def _applied(function: Any, *inputs: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = function.apply(*inputs)
    return results


def _folded(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[batch, ...] and what is mapped over as [size * batch, ...]."""
    if x is None:
        return None
    whole = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return whole.flatten(0, 1)


def _chosen(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
    return x if x is None or dim is None else x.select(dim, i)
