"""How far a 16-bit result may be from the float64 reference, derived and not tuned.

A kernel multiplies in float32 and rounds to the inputs' dtype, with unit roundoff u, at most in
these places: the probabilities P before P V and P^T dO, the score gradients dS before dS K and dS^T
Q, and each result once. A rounded factor changes a sum of products by at most u times the sum of
the products' absolute values, so

    |out|  <= u |out| + u P |V|
    |dV|   <= u |dV| + u P^T |dO|
    |dQ|   <= u |dQ| + scale (u |dS| + P e) |K|
    |dK|   <= u |dK| + scale (u |dS| + P e)^T |Q|

with e = sum_d |dO| (error of out), since delta = rowsum(dO * out) is taken of the rounded out.
SLACK covers second-order terms and the float32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLACK = 1.25
FLOOR = 1e-5


class Bounds(NamedTuple):
    out: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


def error_bounds(
    dtype: torch.dtype,
    tensors: tuple[Tensor, Tensor, Tensor],
    probabilities: Tensor,
    scale: float,
    grad_out: Tensor,
    reference: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Bounds:
    """Elementwise bounds for `reference` = (out, grad_query, grad_key, grad_value); probabilities
    is [B, H, N, N].

    For losses that depend on out alone.
    """
    query, key, value, grad_out = (
        x.detach().to("cpu", torch.float64) for x in (*tensors, grad_out)
    )
    unit = torch.finfo(dtype).eps / 2
    groups = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    out, grad_query, grad_key, grad_value = (x.abs() for x in reference)

    out_error = unit * (out + torch.einsum("bhqk,bkhd->bqhd", probabilities, value.abs()))
    delta_error = (grad_out.abs() * out_error).sum(-1).transpose(1, 2)
    grad_probabilities = torch.einsum("bqhd,bkhd->bhqk", grad_out, value)
    delta = (probabilities * grad_probabilities).sum(-1)
    grad_scores = probabilities * (grad_probabilities - delta[..., None])
    score_error = unit * grad_scores.abs() + probabilities * delta_error[..., None]

    def per_kv_head(x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, groups)).sum(3)

    into_query = scale * torch.einsum("bhqk,bkhd->bqhd", score_error, key.abs())
    into_key = scale * torch.einsum("bhqk,bqhd->bkhd", score_error, query.abs())
    into_value = unit * torch.einsum("bhqk,bqhd->bkhd", probabilities, grad_out.abs())
    bounds = (
        out_error,
        unit * grad_query + into_query,
        unit * grad_key + per_kv_head(into_key),
        unit * grad_value + per_kv_head(into_value),
    )
    return Bounds(*(SLACK * bound + FLOOR for bound in bounds))
