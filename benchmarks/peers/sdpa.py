"""Dense attention by PyTorch's library kernels, on views [batch, rows, heads, head_dim].

PyTorch's public function returns no log-sum-exp, hence the aten operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["cudnn", "flash"]
Saved = tuple[Any, ...]
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Forward:
    """out [B, S, H, D], lse [B, H, S] float32, and what the backward needs beside them.

    `saved` ends with the number of dimensions in which the kernel wants lse: [B, H, S] or, with a
    fourth of length 1, [B, H, S, 1].
    """

    out: Tensor
    lse: Tensor
    saved: Saved


def forward(inputs: Triple, causal: bool, kernel: Kernel) -> Forward:
    """On the CPU there is one kernel, whatever is asked for."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return Forward(out.transpose(1, 2), lse, ())
    if kernel == "cudnn":
        out, lse, *saved = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False
        )
    else:
        out, lse, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    saved = (*saved, lse.dim())
    return Forward(out.transpose(1, 2), lse.reshape(q.shape[:3]), saved)


def backward(
    grad_out: Tensor, inputs: Triple, done: Forward, causal: bool, kernel: Kernel
) -> Triple:
    """Gradients [B, S, H, D]. `done` may hold the out and lse of a softmax over more keys."""
    g, q, k, v, out = (x.transpose(1, 2) for x in (grad_out, *inputs, done.out))
    aten = torch.ops.aten
    if not q.is_cuda:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g, q, k, v, out, done.lse, 0.0, causal
        )
    else:
        cum_q, cum_k, max_q, max_k, seed, offset, _, lse_dims = done.saved
        lse = done.lse.contiguous()
        lse = lse.unsqueeze(-1) if lse_dims == 4 else lse
        if kernel == "cudnn":
            grads = aten._scaled_dot_product_cudnn_attention_backward(
                g, q, k, v, out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, causal
            )
        else:
            grads = aten._scaled_dot_product_flash_attention_backward(
                g, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
            )
    grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
    return grad_query, grad_key, grad_value


class Flash(torch.autograd.Function):
    """(out, lse) of the flash kernel; the log-sum-exp carries no gradient, as in flash-attn."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        done = forward((query, key, value), causal, "flash")
        ctx.save_for_backward(query, key, value, done.out, done.lse)
        ctx.extra = done.saved  # seeds and counts: none of them is an input or an output
        ctx.causal = causal
        ctx.mark_non_differentiable(done.lse)
        return done.out, done.lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        done = Forward(out, lse, ctx.extra)
        return (*backward(grads[0], (query, key, value), done, ctx.causal, "flash"), None)
