"""Small ragged shapes through the CUDA kernels, for compute-sanitizer; needs a GPU.

    compute-sanitizer --tool memcheck python -m tests.sanitize_cuda
    compute-sanitizer --tool racecheck python -m tests.sanitize_cuda bfloat16

Names of dtypes restrict it to them: racecheck is slow.
"""

from __future__ import annotations

import sys

import torch

from dilated_attention_pytorch import (
    DilatedKVCache,
    dilated_attention,
    dilated_attention_with_kvcache,
)
from tests.ops.blocks import make_query_sums

# seq_len, lengths, rates, heads, KV heads, head_dim, causal, dropout, padding, deterministic
CASES = [
    (301, [64, 150], [1, 3], 3, 3, 48, False, 0.0, "zeros", False),
    (333, [100, 400], [2, 4], 4, 2, 64, True, 0.0, "masked", False),
    (190, [64], [3], 2, 1, 20, True, 0.3, "masked", False),
    (150, [64, 128], [1, 2], 2, 2, 128, False, 0.0, "masked", True),
    (130, [64, 128], [1, 2], 2, 1, 256, True, 0.0, "masked", False),
    (201, [64, 150], [1, 2], 4, 2, 64, False, 0.0, "masked", True),
    (190, [64, 128], [1, 3], 2, 2, 90, True, 0.0, "masked", False),
    (130, [64], [2], 2, 1, 160, False, 0.2, "masked", True),
    (190, [64], [3], 4, 2, 48, True, 0.0, "zeros", True),
]


# seq_len, queries, cuts of the keys, lengths, rates, heads, KV heads, head_dim, causal, padding,
# deterministic
BLOCKS = [
    (301, (70, 201), [0, 0, 120, 301], [64, 150], [1, 3], 4, 2, 48, True, "masked", False),
    (301, (0, 301), [0, 77, 301, 301], [64, 150], [2, 3], 3, 3, 20, False, "zeros", True),
    (200, (40, 40), [0, 200], [64], [1], 2, 2, 64, False, "masked", False),
    (260, (100, 260), [0, 90, 260], [64, 260], [1, 2], 2, 1, 128, True, "masked", False),
    (130, (3, 130), [0, 65, 130], [64, 128], [1, 2], 2, 1, 256, False, "masked", False),
]


def run_blocks(dtype: torch.dtype) -> None:
    """Forward and backward over one piece of queries and every piece of keys."""
    for seq_len, (begin, end), cuts, lengths, rates, heads, kv_heads, dim, *rest in BLOCKS:
        causal, padding, repeatable = rest
        torch.use_deterministic_algorithms(repeatable)
        q, k, v = (
            torch.randn(2, rows, n, dim, device="cuda", dtype=dtype)
            for rows, n in ((end - begin, heads), (seq_len, kv_heads), (seq_len, kv_heads))
        )
        options = {"is_causal": causal, "padding": padding}
        pieces = [
            (k[:, a:b], v[:, a:b], seq_len, begin, a, lengths, rates)
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        out = lse = None
        for piece in pieces:
            out, lse = torch.ops.dilated.attention_block(
                q, *piece, out=out, lse=lse, partial=True, **options
            )
        final = out.to(dtype)
        sums = make_query_sums(q)
        grads = []
        for piece in pieces:
            block = (final, torch.ones_like(lse), q, *piece[:2], final, lse, *piece[2:])
            grads += torch.ops.dilated.attention_block_backward(*block, partial=True, **options)
            grads += torch.ops.dilated.attention_block_backward_into(sums, *block, **options)
        grads.append(torch.ops.dilated.round_query_sums(sums, q))
        if not all(torch.isfinite(x).all() for x in grads):
            raise RuntimeError(f"{dtype}, {seq_len} positions: a share is not finite")


def run_batches(dtype: torch.dtype) -> None:
    """Sequences of different lengths, one of them empty, with NaN between them."""
    for rows, lengths, rates, heads, kv_heads, dim, causal, p, padding, repeatable in CASES:
        torch.use_deterministic_algorithms(repeatable)
        half = rows // 2
        places = [(3, half), (half + 3, 0), (half + 9, rows - half - 12)]
        data = [
            torch.full((1, rows, n, dim), torch.nan, device="cuda", dtype=dtype)
            for n in (heads, kv_heads, kv_heads)
        ]
        for first, length in places:
            for x in data:
                x[:, first : first + length].normal_()
        q, k, v = (x.requires_grad_() for x in data)
        options = {"is_causal": causal, "padding": padding, "dropout_p": p}
        seed, table = torch.tensor([1], device="cuda"), torch.tensor(places)
        out, _ = torch.ops.dilated.attention(
            q, k, v, lengths, rates, dropout_seed=seed, sequences=table, **options
        )
        out.float().square().sum().backward()
        if not all(torch.isfinite(x).all() for x in (out, q.grad, k.grad, v.grad)):
            raise RuntimeError(f"{dtype}, {rows} rows: padding was read")


def run_steps(dtype: torch.dtype) -> None:
    """A prompt and steps from a cache that forgets, and queries over a full one."""
    for heads, kv_heads, dim in ((8, 2, 64), (12, 1, 40), (3, 1, 21), (4, 4, 256)):
        lengths, rates = [16, 48, 37], [1, 2, 5]
        q, k, v = (
            torch.randn(2, 90, n, dim, device="cuda", dtype=dtype) for n in (heads, *2 * [kv_heads])
        )
        cache = DilatedKVCache(
            2, kv_heads, dim, lengths, rates, num_heads=heads, dtype=dtype, device="cuda"
        )
        for begin, end in ((0, 40), (40, 60), *((p, p + 1) for p in range(60, 90))):
            cache.append(k[:, begin:end], v[:, begin:end])
            out = cache.attend(q[:, begin:end])
        ends = torch.tensor([90, 77], device="cuda")
        full = dilated_attention_with_kvcache(q[:, :3], k, v, ends, lengths, rates)
        if not (torch.isfinite(out).all() and torch.isfinite(full).all()):
            raise RuntimeError(f"{dtype}, {heads} heads of {dim}: a step is not finite")


def run(dtype: torch.dtype) -> None:
    for seq_len, lengths, rates, heads, kv_heads, dim, causal, p, padding, repeatable in CASES:
        torch.use_deterministic_algorithms(repeatable)
        q, k, v = (
            torch.randn(2, seq_len, n, dim, device="cuda", dtype=dtype, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        )
        out = dilated_attention(
            q, k, v, lengths, rates, is_causal=causal, dropout_p=p, padding=padding
        )
        out.float().square().sum().backward()
        if not all(torch.isfinite(x.grad).all() for x in (q, k, v)):
            raise RuntimeError(f"{dtype}, {seq_len} positions: a gradient is not finite")
    rows = torch.randn(2, 117, 3, 24, device="cuda", dtype=dtype)
    packed = torch.ops.dilated.gather(rows, 40, 3, start=7)
    torch.ops.dilated.scatter_add(rows, packed, 40, 3, start=7)
    offsets = torch.tensor([2, -1, 0])
    for accumulate in (False, True):
        torch.ops.dilated.gather_into(packed, rows, 40, 3, head_offsets=offsets, start=7)
        torch.ops.dilated.scatter_into(
            rows[:, 1:], packed, 40, 3, head_offsets=offsets, start=8, accumulate=accumulate
        )
    many = torch.randn(1, 40, 300, 8, device="cuda", dtype=dtype)  # a table of its own in memory
    offsets = torch.arange(300) % 3
    packed = torch.ops.dilated.gather(many, 20, 3, head_offsets=offsets)
    torch.ops.dilated.scatter_add(many, packed, 20, 3, head_offsets=offsets)
    torch.cuda.synchronize()


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or ["bfloat16", "float16", "float32"]:
        run(getattr(torch, name))
        run_blocks(getattr(torch, name))
        run_batches(getattr(torch, name))
        run_steps(getattr(torch, name))
        print(f"{name}: done")
