"""Wrong arguments of the caches: argument, rule, value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import DilatedKVCache, dilated_attention_with_kvcache

X = torch.zeros(2, 3, 4, 8)  # [batch, seq_len, heads, head_dim]
KV = torch.zeros(2, 3, 2, 8)


def cache(**options: Any) -> DilatedKVCache:
    return DilatedKVCache(2, 2, 8, [16, 32], [1, 2], **{"num_heads": 4, **options})


def appended(**options: Any) -> DilatedKVCache:
    made = cache(**options)
    made.append(KV, KV)
    return made


def full(query: Any = X, keys: Any = KV, values: Any = KV, lens: Any = 3, **options: Any) -> object:
    return dilated_attention_with_kvcache(query, keys, values, lens, [16], [1], **options)


def loaded(made: DilatedKVCache | None = None, **changes: Any) -> None:
    """A state that is refused changes nothing."""
    made = appended() if made is None else made
    before = made.lengths
    try:
        made.load_state_dict(made.state_dict() | changes)
    finally:
        assert made.lengths == before


def limited(**changes: Any) -> None:
    loaded(cache(max_seq_len=5), **changes)


def growing(**changes: Any) -> None:
    loaded(DilatedKVCache(2, 2, 8, [16, 2**40], [1, 2], num_heads=4), **changes)


def uneven() -> DilatedKVCache:
    made = cache()
    made.append(KV, KV, seq_lens=[3, 1])
    return made


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: DilatedKVCache(0, 1, 8, [4], [1]), "batch_size must be at least 1, got 0"),
    (lambda: DilatedKVCache(1, 0, 8, [4], [1]), "num_kv_heads must be at least 1 and below 2^16"),
    (lambda: DilatedKVCache(1, 1, 257, [4], [1]), "head_dim must be at least 1 and below 257"),
    (lambda: cache(num_heads=3), "num_kv_heads must divide num_heads, 3, got 2"),
    (lambda: cache(max_seq_len=0), "max_seq_len must be at least 1"),
    (lambda: cache(dtype=torch.int64), "dtype must be one of float16, bfloat16, float32, float64"),
    (lambda: cache(head_offsets=[[0], [0]]), "head_offsets must have one column for each of the 4"),
    (lambda: DilatedKVCache(1, 1, 8, [4, 5], [1]), "segment_lengths and dilation_rates must have"),
    (lambda: cache().append(X, KV), "key must be [2, seq_len, 2, 8] (batch, seq_len, heads, "),
    (lambda: cache().append(KV, KV[:, :2]), "value must be [2, 3, 2, 8] (batch, seq_len, heads, "),
    (lambda: cache().append(KV[:1], KV), "head_dim), got shape (1, 3, 2, 8)"),
    (
        lambda: cache().append(KV.double(), KV),
        "key must be float32, the dtype of the cache, got flo",
    ),
    (
        lambda: cache().append(KV, KV.half()),
        "value must be float32, the dtype of the cache, got fl",
    ),
    (
        lambda: cache().append(KV.to("meta"), KV),
        "key must be cpu, the device of the cache, got meta",
    ),
    (lambda: cache().append(KV, KV, seq_lens=[4, 1]), "seq_lens must be at least 0 and below 4"),
    (lambda: cache().append(KV, KV, seq_lens=[1]), "seq_lens must be 2 integers, one a row, got 1"),
    (
        lambda: cache().append(KV.clone().requires_grad_(), KV),
        "key must not require a gradient, as a cache gives none (torch.no_grad), got one that does",
    ),
    (
        lambda: appended(max_seq_len=5).append(KV, KV),
        "key must have at most 2 positions more, where max_seq_len is 5 and 3 are there, got 3",
    ),
    (
        lambda: cache().attend(X),
        "query must be of positions that were appended and not attended, got one",
    ),
    (
        lambda: appended().attend(X[:, :2]),
        "query must be [2, 3, 4, 8] (batch, seq_len, heads, head",
    ),
    (lambda: appended().attend(KV), "query must be [2, 3, 4, 8]"),
    (
        lambda: appended().attend(X.double()),
        "query must be float32, the dtype of the cache, got flo",
    ),
    (lambda: appended().attend(X, scale=torch.inf), "scale must be finite, got inf"),
    (lambda: cache().reorder([]), "indices must be at least one integer, got none"),
    (lambda: cache().reorder([0, 2]), "indices must be at least 0 and below 2, got 2"),
    (
        lambda: appended().crop(2),
        "length must be the cache's, 3, as rows before it are overwritten",
    ),
    (lambda: loaded(more=1), "state must have the entries ['appended', "),
    (
        lambda: loaded(segment_lengths=(8, 32)),
        "state must have segment_lengths (16, 32), got (8, 3",
    ),
    (lambda: loaded(lengths=(1,)), "state['lengths'] must be 2 integers, one a row, got 1"),
    (lambda: loaded(key=KV), "state['key'] must be [2, 64, 8], got shape [2, 3, 2, 8]"),
    (lambda: loaded(capacity=3), "state must have capacity 32, got 3"),
    (lambda: loaded(key=None), "state['key'] must be a tensor, got NoneType"),
    (lambda: loaded(appended=3), "state['appended'] must be None or key, value and counts, got 3"),
    (lambda: loaded(appended=(KV, 3, None)), "state['appended'][1] must be a tensor, got int"),
    (lambda: loaded(appended=(X, X, None)), "state['appended'][0] must be [2, seq_len, 2, 8]"),
    (
        lambda: loaded(appended=(KV, KV[:, :2], None)),
        "state['appended'][1] must be [2, 3, 2, 8]",
    ),
    (
        lambda: loaded(appended=(KV, KV, (-4, 100))),
        "state['appended'][2] must be at least 0 and below 4, got -4",
    ),
    (lambda: limited(lengths=(6, 0)), "state['lengths'] must be at least 0 and below 6, got 6"),
    (
        lambda: limited(lengths=(3, 0), appended=(KV, KV, None)),
        "state['lengths'] and ['appended'] together must be at least 0 and below 6, got 6",
    ),
    (lambda: growing(lengths=(9, 0)), "state['lengths'] must be at least 0 and below 1, got 9"),
    (lambda: growing(capacity=-5), "state['capacity'] must be at least 0, got -5"),
    (lambda: growing(capacity="a"), "state['capacity'] must be an integer, got 'a'"),
    (lambda: uneven().crop(3), "length must be the cache's, (3, 1), as rows before it are over"),
    (lambda: DilatedKVCache(1, 1, 8, [4] * 17, [1] * 17), "segment_lengths must be at most 16 bra"),
    (lambda: full(X[0]), "query must be [batch, seq_len, heads, head_dim], got shape (3, 4, 8)"),
    (lambda: full(X[:, :, :3]), "query must have a multiple of key_cache's heads, 2, got 3"),
    (lambda: full(X.double()), "query must be float32, the dtype of the cache, got float64"),
    (lambda: full(values=X), "value_cache must be [2, 3, 2, 8]"),
    (lambda: full(key=KV), "value must be given where key is, got None"),
    (lambda: full(value=KV), "key must be given where value is, got None"),
    (
        lambda: full(keys=KV[:1].expand(2, -1, -1, -1), lens=0, key=KV, value=KV),
        "key_cache must have a place for each row, as rows are written into it, got one of strides",
    ),
    (lambda: full(lens=[3, 4]), "cache_seqlens must be at least 0 and below 4, got 4"),
    (lambda: full(lens=1, key=KV, value=KV), "cache_seqlens must be at least 0 and below 1, got 1"),
    (lambda: full(lens=2.5), "cache_seqlens must be a sequence of integers, got 2.5"),
    (
        lambda: full(lens=[3, 2]),
        "cache_seqlens must leave a text the positions of query, at least 3, got 2",
    ),
    (lambda: full(pattern_cache=3), "pattern_cache must be a PatternCache"),
]


@pytest.mark.parametrize(("call", "said"), WRONG, ids=[said[:40] for _, said in WRONG])
def test_wrong_arguments(call: Callable[[], object], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(said)):
        call()


def test_a_refused_append_changes_nothing() -> None:
    made = appended(max_seq_len=5)
    with pytest.raises(ValueError, match="key must have at most"):
        made.append(KV, KV)
    assert made.lengths == (3, 3) and made.attend(X).shape == X.shape
    with pytest.raises(ValueError, match="query must be of positions that were appended"):
        made.attend(X)
