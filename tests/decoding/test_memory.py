"""What a cache holds, counted, and that it stays so."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import DilatedKVCache

LENGTHS, RATES = [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]


def rows_of(cache: DilatedKVCache) -> float:
    """Rows of a KV head, on average, where a row is a key and a value."""
    row = 2 * cache.batch_size * cache.num_kv_heads * cache.head_dim * cache.dtype.itemsize
    return cache.nbytes / row


def test_a_head_keeps_w_over_r_rows_of_each_branch() -> None:
    cache = DilatedKVCache(2, 4, 8, LENGTHS, RATES)
    assert rows_of(cache) == 10_240  # sum of w / r
    ragged = DilatedKVCache(1, 1, 8, [7, 10], [2, 3])
    assert rows_of(ragged) == 4 + 4


@pytest.mark.parametrize(
    ("head_offsets", "rows"),
    [
        ("interleaved", 30_720),
        ("blocked", 12_288),
        ([[h // 4 % r for h in range(32)] for r in RATES], 10_240),
    ],
    ids=["interleaved", "blocked", "shared"],
)
def test_a_kv_head_keeps_the_lattices_of_its_group(head_offsets: object, rows: int) -> None:
    options = {"num_heads": 32, "head_offsets": head_offsets, "dtype": torch.bfloat16}
    assert rows_of(DilatedKVCache(1, 8, 4, LENGTHS, RATES, **options)) == rows


def test_heads_that_are_in_no_branch_keep_nothing() -> None:
    table = [[0, -1], [-1, -1], [5, 5]]
    cache = DilatedKVCache(1, 2, 4, [16, 16, 4], [1, 1, 8], head_offsets=table)
    assert rows_of(cache) == 16 / 2  # offset 5 does not occur in segments of 4


def test_max_seq_len_bounds_the_rows() -> None:
    cache = DilatedKVCache(1, 2, 4, [16, 2**62], [1, 3], max_seq_len=100)
    assert rows_of(cache) == 16 + 34
    short = DilatedKVCache(1, 2, 4, [16, 2**62], [1, 3], max_seq_len=5)
    assert rows_of(short) == 5 + 2


def test_buffers_of_the_whole_text_grow_with_it() -> None:
    cache = DilatedKVCache(1, 1, 4, [16, 2**31 - 1], [1, 4])
    assert rows_of(cache) == 16
    x = torch.randn(1, 1000, 1, 4)
    for begin in range(0, 1000, 10):
        cache.append(x[:, begin : begin + 10], x[:, begin : begin + 10])
        cache.attend(x[:, begin : begin + 10])
        assert rows_of(cache) <= 16 + 2 * max(begin // 4 + 3, 32)


def test_a_waiting_append_counts_until_it_is_attended() -> None:
    cache = DilatedKVCache(1, 2, 4, [16], [1])
    rows = cache.nbytes
    x = torch.randn(1, 5, 2, 4)
    cache.append(x, x)
    assert cache.nbytes == rows + 2 * x.nbytes
    cache.attend(x)
    assert cache.nbytes == rows


def test_memory_does_not_grow_with_the_text() -> None:
    """100,000 positions; a step's tensors are those of the first."""
    cache = DilatedKVCache(1, 1, 2, [8, 64], [1, 8])
    nbytes, pointers = cache.nbytes, [branch.key.data_ptr() for branch in cache._branches]
    x = torch.randn(1, 1, 1, 2)
    for _ in range(2_000):
        cache.append(x, x)
        cache.attend(x)
    x = torch.randn(1, 1_000, 1, 2)
    for _ in range(98):
        cache.append(x, x)
        cache.attend(x)
    assert cache.length == 100_000 and cache.nbytes == nbytes
    assert pointers == [branch.key.data_ptr() for branch in cache._branches]
