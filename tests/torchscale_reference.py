"""torchscale's dilated attention, its arithmetic derived anew in float64 (forward only).

Each branch by itself: the sequence is zero-padded to whole segments and each segment to whole
strides of the rate, the padding taking part in the softmax; heads come in contiguous blocks, one
block a residue; the branches' outputs are mixed by the softmax of their log-sum-exps. Two of
torchscale's faults are left out or optional: rows a branch doesn't cover are marked by -inf (there:
by a log-sum-exp of exactly 0), and `misalign` chooses its faulty reassembly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _branch(
    query: Tensor, key: Tensor, value: Tensor, w: int, r: int, misalign: bool
) -> tuple[Tensor, Tensor]:
    """One branch: out [B, N, H, D] (0 where not covered) and lse [B, N, H] (-inf there)."""
    batch, seq_len, heads, head_dim = query.shape
    w = min(w, seq_len)
    segments, width = -(-seq_len // w), _round_up(w, r)
    block = _round_up(heads, r) // r

    def split(x: Tensor) -> Tensor:  # [B, N, H, D] -> [B, segments, slots, r, H, D]
        x = functional.pad(x, (0, 0, 0, 0, 0, segments * w - seq_len)).view(
            batch, segments, w, heads, head_dim
        )
        x = functional.pad(x, (0, 0, 0, 0, 0, width - w))
        return x.view(batch, segments, width // r, r, heads, head_dim)

    query, key, value = split(query), split(key), split(value)
    out = torch.zeros_like(query)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=query.dtype)
    for residue in range(r):
        mine = slice(residue * block, min((residue + 1) * block, heads))
        q, k, v = (x[:, :, :, residue, mine] for x in (query, key, value))
        scores = torch.einsum("bsihd,bsjhd->bsihj", q, k) * head_dim**-0.5
        out[:, :, :, residue, mine] = torch.einsum("bsihj,bsjhd->bsihd", scores.softmax(-1), v)
        lse[:, :, :, residue, mine] = scores.logsumexp(-1)

    kept = width if misalign else w  # the width with which torchscale lays segments side by side
    out = out.reshape(batch, segments, width, heads, head_dim)[:, :, :kept]
    lse = lse.reshape(batch, segments, width, heads)[:, :, :kept]
    return out.flatten(1, 2)[:, :seq_len], lse.flatten(1, 2)[:, :seq_len]


def torchscale_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    misalign: bool = False,
) -> tuple[Tensor, Tensor]:
    """Non-causal out [B, N, H, D] and lse [B, H, N] for [B, N, H, D] inputs."""
    query, key, value = (x.to("cpu", torch.float64) for x in (query, key, value))
    pairs = zip(segment_lengths, dilation_rates, strict=True)
    outs, lses = zip(*(_branch(query, key, value, w, r, misalign) for w, r in pairs), strict=True)
    stacked = torch.stack(lses)
    weights = stacked.softmax(0).nan_to_num(0.0)  # a row that no branch covers: softmax of all -inf
    out = sum(weight[..., None] * branch for weight, branch in zip(weights, outs, strict=True))
    return out, stacked.logsumexp(0).transpose(1, 2)
