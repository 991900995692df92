"""Dense attention by PyTorch's library kernels, on views [batch, rows, heads, head_dim].

PyTorch's public function returns no log-sum-exp, hence the aten operators, which are differentiable
as they are: out has a gradient, the log-sum-exp none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .calls import Triple

Kernel = Literal["cudnn", "flash"]


@dataclass(frozen=True, slots=True)
class Forward:
    """out [B, S, H, D], lse [B, H, S] float32, and what the backward needs beside them.

    `saved` ends with the number of dimensions in which the kernel wants lse: [B, H, S] or, with a
    fourth of length 1, [B, H, S, 1].
    """

    out: Tensor
    lse: Tensor
    saved: tuple[Any, ...]


def forward(inputs: Triple, causal: bool, kernel: Kernel) -> Forward:
    """On the CPU there is one kernel, whatever is asked for."""
    q, k, v = (x.transpose(1, 2) for x in inputs)
    aten = torch.ops.aten
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return Forward(out.transpose(1, 2), lse, ())
    if kernel == "cudnn":
        options = (None, True, 0.0, causal, False)  # no bias, but lse
        out, lse, *saved = aten._scaled_dot_product_cudnn_attention(q, k, v, *options)
    else:
        out, lse, *saved = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False)
    return Forward(out.transpose(1, 2), lse.reshape(q.shape[:3]), (*saved, lse.dim()))


def backward(
    grad_out: Tensor, inputs: Triple, done: Forward, causal: bool, kernel: Kernel
) -> Triple:
    """Gradients [B, S, H, D]. `done` may hold the out and lse of a softmax over more keys."""
    given = [x.transpose(1, 2) for x in (grad_out, *inputs, done.out)]
    aten = torch.ops.aten
    if not grad_out.is_cuda:
        options = (done.lse, 0.0, causal)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, *options)
    else:
        *lengths, seed, offset, _, lse_dims = done.saved
        lse = done.lse.contiguous()
        lse = lse.unsqueeze(-1) if lse_dims == 4 else lse
        if kernel == "cudnn":
            options = (lse, seed, offset, None, *lengths, 0.0, causal)
            grads = aten._scaled_dot_product_cudnn_attention_backward(*given, *options)
        else:
            options = (lse, *lengths, 0.0, causal, seed, offset)
            grads = aten._scaled_dot_product_flash_attention_backward(*given, *options)
    return tuple(grad.transpose(1, 2) for grad in grads)
