"""Small ragged shapes through the CUDA kernels, for compute-sanitizer; needs a GPU.

    compute-sanitizer --tool memcheck python -m tests.sanitize_cuda
    compute-sanitizer --tool racecheck python -m tests.sanitize_cuda bfloat16

Names of dtypes restrict it to them: racecheck is slow.
"""

from __future__ import annotations

import sys

import torch

from dilated_attention_pytorch import dilated_attention

# seq_len, lengths, rates, heads, KV heads, head_dim, causal, dropout, padding, deterministic
CASES = [
    (301, [64, 150], [1, 3], 3, 3, 48, False, 0.0, "zeros", False),
    (333, [100, 400], [2, 4], 4, 2, 64, True, 0.0, "masked", False),
    (190, [64], [3], 2, 1, 20, True, 0.3, "masked", False),
    (150, [64, 128], [1, 2], 2, 2, 128, False, 0.0, "masked", True),
    (130, [64, 128], [1, 2], 2, 1, 256, True, 0.0, "masked", False),
]


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
    torch.cuda.synchronize()


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in sys.argv[1:] or ["bfloat16", "float16", "float32"]:
        run(getattr(torch, name))
        print(f"{name}: done")
