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
    apart = DilatedKVCache(1, 4, 8, [2048, 4097], [1, 2])
    assert rows_of(apart) == 2048 + (2049 + 2048) / 2  # offsets 0 and 1
    ragged = DilatedKVCache(1, 1, 8, [7, 10], [2, 3])
    assert rows_of(ragged) == 4 + 4


def test_lattices_that_nest_share_their_rows() -> None:
    cache = DilatedKVCache(2, 4, 8, LENGTHS, RATES)
    assert rows_of(cache) == 6_144  # of sum(w / r) = 10,240
    assert rows_of(DilatedKVCache(1, 1, 8, [16, 16, 48], [1, 4, 4])) == 16 + 0 + 32 / 4
    # Segments of 6 begin off the lattice of rate 4.
    assert rows_of(DilatedKVCache(1, 1, 8, [6, 12], [4, 4])) == 2 + 3


@pytest.mark.parametrize(
    ("head_offsets", "rows"),
    [
        ("interleaved", 16_384),
        ("blocked", 9_312),
        ([[h // 4 % r for h in range(32)] for r in RATES], 6_144),
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
    assert rows_of(cache) == 16 + 96 / 3  # nested: the last 4 positions are in the first branch
    short = DilatedKVCache(1, 2, 4, [16, 2**62], [1, 3], max_seq_len=5)
    assert rows_of(short) == 5 + 0


def test_buffers_of_the_whole_text_grow_with_it() -> None:
    cache = DilatedKVCache(1, 1, 4, [16, 2**31 - 1], [1, 4])
    x = torch.randn(1, 1000, 1, 4)
    for begin in range(0, 1000, 10):
        cache.append(x[:, begin : begin + 10], x[:, begin : begin + 10])
        cache.attend(x[:, begin : begin + 10])
        assert rows_of(cache) <= 16 + 2 * max((begin + 10) / 4, 32)


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
    nbytes, pointer = cache.nbytes, cache._rows.key.data_ptr()
    x = torch.randn(1, 1, 1, 2)
    for _ in range(2_000):
        cache.append(x, x)
        cache.attend(x)
    x = torch.randn(1, 1_000, 1, 2)
    for _ in range(98):
        cache.append(x, x)
        cache.attend(x)
    assert cache.length == 100_000 and cache.nbytes == nbytes
    assert pointer == cache._rows.key.data_ptr()
