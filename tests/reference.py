"""Dilated attention written from its definition: dense, masked, float64, one softmax over the
multiset of keys.

Nothing here knows the planner, tiles or kernels. Gradients come from autograd on these float64
expressions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Positions = tuple[int, int] | Tensor  # (begin, end), or one by one


def listed(positions: Positions | None, seq_len: int = 0) -> Tensor:
    """int64 [rows]; None: of the whole sequence."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(*(positions or (0, seq_len)))


def interleaved_table(dilation_rates: Sequence[int], heads: int) -> Tensor:
    """The paper's offsets: head h takes h mod r. int64 [branches, heads]."""
    return torch.tensor([[h % r for h in range(heads)] for r in dilation_rates]).view(-1, heads)


def blocked_table(dilation_rates: Sequence[int], heads: int) -> Tensor:
    """torchscale's offsets: head h takes h // ceil(heads / r). int64 [branches, heads]."""
    rows = [[h // -(-heads // r) for h in range(heads)] for r in dilation_rates]
    return torch.tensor(rows).view(-1, heads)


def lattice_offset(position: Tensor, segment_length: int, rate: int) -> Tensor:
    """Which residue of its segment's lattice a position is on."""
    return (position % segment_length) % rate


def branch_pairs(
    seq_len: int, w: int, r: int, offset: int, queries: Tensor, keys: Tensor, is_causal: bool
) -> Tensor:
    """bool [queries, keys]: the pairs that one head's branch holds."""
    w = min(w, seq_len)
    if offset < 0 or w == 0:
        return torch.zeros(len(queries), len(keys), dtype=torch.bool)
    on_lattice = (lattice_offset(queries, w, r) == offset)[:, None] & (
        lattice_offset(keys, w, r) == offset
    )[None, :]
    pairs = on_lattice & (queries[:, None] // w == keys[None, :] // w)
    return pairs & (keys[None, :] <= queries[:, None]) if is_causal else pairs


def multiplicities(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    offsets: Tensor,
    is_causal: bool,
    queries: Positions | None = None,
    keys: Positions | None = None,
) -> Tensor:
    """int64 [heads, queries, keys]: in how many branches each pair is (k_pt)."""
    rows, columns = listed(queries, seq_len), listed(keys, seq_len)
    counts = torch.zeros(offsets.shape[1], len(rows), len(columns), dtype=torch.int64)
    branches = zip(segment_lengths, dilation_rates, offsets.tolist(), strict=True)
    for w, r, row_of_offsets in branches:
        for offset in set(row_of_offsets):
            pairs = branch_pairs(seq_len, w, r, offset, rows, columns, is_causal)
            counts[torch.tensor(row_of_offsets) == offset] += pairs
    return counts


def zero_key_counts(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    offsets: Tensor,
    queries: Positions | None = None,
) -> Tensor:
    """int64 [heads, queries]: keys of score 0 and value 0 that padding="zeros" adds (never when
    causal).

    A segment has ceil(w / r) slots; those beyond the sequence's end, or beyond w, count as such
    keys.
    """
    rows = listed(queries, seq_len)
    counts = torch.zeros(offsets.shape[1], len(rows), dtype=torch.int64)
    for w, r, row_of_offsets in zip(segment_lengths, dilation_rates, offsets.tolist(), strict=True):
        w = min(w, max(seq_len, 1))
        begin = rows // w * w
        length = (begin + w).clamp(max=seq_len) - begin
        for offset in set(row_of_offsets) - {-1}:
            present = (length - offset + r - 1).clamp(
                min=0
            ) // r  # offset, offset + r, ... < length
            missing = torch.where(lattice_offset(rows, w, r) == offset, -(-w // r) - present, 0)
            counts[torch.tensor(row_of_offsets) == offset] += missing
    return counts


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def dropout_keep(
    seed: int, probability: float, batch: int, heads: int, queries: Positions, keys: Positions
) -> Tensor:
    """bool [batch, heads, queries, keys]: the pairs that dropout keeps (the hash of
    csrc/kernels/dropout.h).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        places = np.arange(heads, dtype=np.uint64) << np.uint64(32)
        places = places + np.arange(1, batch + 1, dtype=np.uint64)[:, None]
        stream = _mix64(np.array(seed).astype(np.int64).view(np.uint64) + golden * places)
        steps = golden * (listed(queries).numpy().astype(np.uint64) + np.uint64(1))
        row_keys = _mix64(stream[..., None] + steps).astype(np.uint32)
        columns = listed(keys).numpy().astype(np.uint32) * np.uint32(0x9E3779B9)
        hashes = _mix32(row_keys[..., None] ^ columns)
    threshold = np.uint32(float(np.float32(probability)) * 2.0**32)
    return torch.from_numpy(hashes >= threshold)


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    padding: str = "masked",
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    seq_len: int | None = None,
    query_begin: int = 0,
    key_begin: int = 0,
    positions: tuple[Tensor, Tensor] | None = None,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Nq, H, D] and lse [B, H, Nq], float64 on the CPU, for query [B, Nq, H, D] and key,
    value [B, Nk, Hkv, D].

    `query_begin` and `key_begin` place the rows in a sequence of `seq_len` positions, or
    `positions`, of the queries and of the keys. `visible`, bool [Nq, Nk], leaves pairs out. `keep`
    is the mask of `dropout_keep`; kept weights are divided by 1 - dropout_p, and the lse is that of
    all pairs.
    """
    query, key, value = (x.to("cpu", torch.float64) for x in (query, key, value))
    heads, kv_heads = query.shape[2], key.shape[2]
    seq_len = query.shape[1] if seq_len is None else seq_len
    queries: Positions = (query_begin, query_begin + query.shape[1])
    keys: Positions = (key_begin, key_begin + key.shape[1])
    if positions is not None:
        queries, keys = positions
    if head_offsets is None:
        head_offsets = interleaved_table(dilation_rates, heads)
    spec = (seq_len, segment_lengths, dilation_rates, head_offsets)
    counts = multiplicities(*spec, is_causal, queries, keys)[None]
    if visible is not None:
        counts = counts * visible
    extra = torch.zeros(1, heads, query.shape[1], dtype=torch.int64)
    if padding == "zeros" and not is_causal:
        extra = zero_key_counts(*spec, queries)[None]

    key, value = (x.repeat_interleave(heads // kv_heads, dim=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", query, key)
    absent = torch.tensor(-torch.inf, dtype=torch.float64)
    scores = torch.where(counts > 0, scores, absent)

    # The largest score, only to keep the exponentials in range: it cancels, so it carries no
    # gradient.
    top = torch.where(extra > 0, 0.0, absent).expand(scores.shape[:3])
    if scores.shape[-1] > 0:
        top = torch.maximum(top, scores.detach().amax(-1))
    covered = torch.isfinite(top)
    top = torch.where(covered, top, 0.0)
    weights = counts * torch.exp(scores - top[..., None])
    zero_keys = torch.where(extra > 0, extra * torch.exp(-top), 0.0)  # not 0 * inf
    total = torch.where(covered, weights.sum(-1) + zero_keys, 1.0)
    lse = torch.where(covered, top + torch.log(total), absent)
    probabilities = weights / total[..., None]
    if keep is not None:
        probabilities = probabilities * keep / (1 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, value), lse
