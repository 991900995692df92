"""The cache that forgets against one causal call over the whole text."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import DilatedKVCache, dilated_attention
from tests.conftest import make_qkv
from tests.decoding.texts import (
    assert_close,
    bad_rows,
    decode,
    nested_case,
    random_case,
    random_chunks,
)


@pytest.mark.parametrize("seed", range(150))
def test_steps_equal_one_causal_call(seed: int) -> None:
    case = random_case(seed)
    rows = case.qkv(seed)
    assert_close(decode(case.cache(), *rows, [1] * case.seq_len), case.reference(*rows))


@pytest.mark.parametrize("seed", range(150, 300))
def test_random_chunks_equal_one_causal_call(seed: int) -> None:
    case = random_case(seed)
    rows = case.qkv(seed, batch=2)
    chunks = random_chunks(seed, case.seq_len)
    cache = case.cache(2, max_seq_len=case.seq_len if seed % 2 else None)
    assert_close(decode(cache, *rows, chunks), case.reference(*rows))
    assert cache.length == case.seq_len and cache.lengths == (case.seq_len,) * 2


@pytest.mark.parametrize("seed", range(60))
def test_a_cache_that_grows_keeps_what_longer_segments_owe(seed: int) -> None:
    case = nested_case(seed)
    rows = case.qkv(seed)
    for chunks in ([1] * case.seq_len, random_chunks(seed, case.seq_len)):
        assert_close(decode(case.cache(), *rows, chunks), case.reference(*rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_and_device(device: str, dtype: torch.dtype) -> None:
    branches = ([16, 60, 2**40], [1, 3, 8])
    q, k, v = make_qkv(150, 8, kv_heads=2, dtype=dtype, device=device)
    cache = DilatedKVCache(1, 2, 16, *branches, num_heads=8, dtype=dtype, device=device)
    actual = decode(cache, q, k, v, [100, 1, 1, 40, 8])
    expected = dilated_attention(q, k, v, *branches, is_causal=True, return_lse=True)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(300, 340))
def test_random_patterns_in_every_dtype(device: str, seed: int, dtype: torch.dtype) -> None:
    head_dim = random.Random(seed).choice([8, 40, 64, 128])
    case = random_case(seed)._replace(head_dim=head_dim)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    rows = case.qkv(seed, batch=2, **options)
    cache = case.cache(2, max_seq_len=case.seq_len if seed % 2 else None, **options)
    actual = decode(cache, *rows, random_chunks(seed, case.seq_len))
    expected = case.reference(*(x.double().cpu() for x in rows))
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    got = [x.double().cpu() for x in actual]
    torch.testing.assert_close(got, list(expected), rtol=tolerance, atol=tolerance)


def test_a_chunk_longer_than_what_is_scored_at_once() -> None:
    q, k, v = make_qkv(1200, 2)
    cache = DilatedKVCache(1, 2, 16, [2**40, 700], [1, 3], dtype=torch.float64)
    expected = dilated_attention(
        q, k, v, [2**40, 700], [1, 3], is_causal=True, scale=0.3, return_lse=True
    )
    cache.append(k[:, :1], v[:, :1])
    cache.append(k[:, 1:], v[:, 1:])
    actual = cache.attend(q[:, 1:], scale=0.3, return_lse=True)
    assert_close(actual, (expected[0][:, 1:], expected[1][:, :, 1:]))


@pytest.mark.parametrize("seed", range(300, 340))
def test_appends_that_nobody_attends_are_kept(seed: int) -> None:
    case = random_case(seed)
    q, k, v = case.qkv(seed)
    cache, draw, end = case.cache(), random.Random(seed), 0
    for chunk in random_chunks(seed, case.seq_len):
        begin, end = end, end + chunk
        cache.append(k[:, begin:end], v[:, begin:end])
        if draw.random() < 0.3:
            expected = case.reference(q[:, :end], k[:, :end], v[:, :end])
            actual = cache.attend(q[:, begin:end], return_lse=True)
            assert_close(actual, (expected[0][:, begin:], expected[1][:, :, begin:]))


@pytest.mark.parametrize("seed", range(340, 380))
def test_texts_of_different_lengths(seed: int) -> None:
    case, draw = random_case(seed), random.Random(seed)
    q, k, v = case.qkv(seed, batch=3)
    cache, lengths = case.cache(3), [0, 0, 0]
    expected = case.reference(q, k, v)
    while min(lengths) < case.seq_len:
        n = draw.choice([1, 1, 5, 20])
        counts = [min(draw.choice([0, n, draw.randint(0, n)]), case.seq_len - x) for x in lengths]
        key, value, query = (bad_rows(x, n) for x in (k, v, q))
        for b, (begin, count) in enumerate(zip(lengths, counts, strict=True)):
            for rows, source in ((key, k), (value, v), (query, q)):
                rows[b, :count] = source[b, begin : begin + count]
        cache.append(key, value, seq_lens=torch.tensor(counts))
        out, lse = cache.attend(query, return_lse=True)
        for b, (begin, count) in enumerate(zip(lengths, counts, strict=True)):
            rows = slice(begin, begin + count)
            assert_close(
                (out[b, :count], lse[b, :, :count]), (expected[0][b, rows], expected[1][b, :, rows])
            )
            assert torch.all(out[b, count:] == 0) and torch.all(lse[b, :, count:] == -torch.inf)
        lengths = [x + count for x, count in zip(lengths, counts, strict=True)]
        assert cache.lengths == tuple(lengths)


@pytest.mark.parametrize("seed", range(380, 400))
def test_a_cache_after_one_ordinary_call(seed: int) -> None:
    case = random_case(seed)
    q, k, v = case.qkv(seed, batch=2)
    begin = case.seq_len // 2
    cache = DilatedKVCache.from_prefill(
        k[:, :begin],
        v[:, :begin],
        case.segment_lengths,
        case.dilation_rates,
        num_heads=case.heads,
        head_offsets=case.table,
    )
    chunks = [1] * (case.seq_len - begin)
    expected = case.reference(q, k, v)
    actual = decode(cache, q, k, v, chunks, begin)
    assert_close(actual, (expected[0][:, begin:], expected[1][:, :, begin:]))


def test_a_row_that_was_overwritten_or_never_written_is_never_read() -> None:
    """The rows past the open segment's are made NaN before every step."""
    case = random_case(7)
    lengths, rates = [7, 20, 33, 40], [2, 1, 3, 2]  # the last nests in the second
    case = case._replace(segment_lengths=lengths, dilation_rates=rates, seq_len=100)
    case = case._replace(table=torch.tensor([[1], [0], [2], [1]]).expand(4, case.heads))
    q, k, v = case.qkv(7)
    cache, expected = case.cache(), case.reference(q, k, v)
    layout = cache._rows.layout
    for p in range(case.seq_len):
        for lattice in layout.lattices:
            w, r = (x[lattice.branch] for x in (layout.segment_lengths, layout.dilation_rates))
            stored = len(range(lattice.offset, p % w, r))
            unused = slice(lattice.first + min(stored, lattice.rows), lattice.first + lattice.rows)
            cache._rows.key[:, unused] = torch.nan
            cache._rows.value[:, unused] = torch.nan
        (out, lse) = decode(cache, q, k, v, [1], p)
        assert_close((out, lse), (expected[0][:, p : p + 1], expected[1][:, :, p : p + 1]))


def test_what_was_appended_is_a_copy() -> None:
    q, k, v = make_qkv(3)
    cache = DilatedKVCache(1, 4, 16, [8], [1], dtype=torch.float64)
    key, value = k.clone(), v.clone()
    cache.append(key, value)
    key.fill_(torch.nan)
    value.fill_(torch.nan)
    expected = dilated_attention(q, k, v, [8], [1], is_causal=True)
    torch.testing.assert_close(cache.attend(q), expected, rtol=0, atol=1e-12)


def test_what_fails_halfway_resets_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = make_qkv(12)
    cache = DilatedKVCache(1, 4, 16, [8], [1], dtype=torch.float64)
    decode(cache, q, k, v, [6])
    cache.append(k[:, 6:], v[:, 6:])

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dilated_attention_pytorch.ops.decode_step", fail)
        cache.attend(q[:, 6:])
    assert cache.length == 0
    expected = dilated_attention(q, k, v, [8], [1], is_causal=True, return_lse=True)
    assert_close(decode(cache, q, k, v, [6, 6]), expected)


def test_under_autocast_the_rows_keep_their_dtype() -> None:
    q, k, v = make_qkv(20, dtype=torch.float32)
    cache = DilatedKVCache(1, 4, 16, [8], [1], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = decode(cache, q, k, v, [5, 15])
    expected = dilated_attention(q, k, v, [8], [1], is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
