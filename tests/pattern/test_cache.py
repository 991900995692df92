"""The cache: bounded, least recently used first out, counted, complete keys, safe to share."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from dilated_attention_pytorch import PatternCache, default_pattern_cache, dilated_attention
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches
from tests.conftest import make_qkv, missing_cuda

BASE = PatternSpec(48, make_branches([16, 32], [1, 2]), "interleaved", heads=4, kv_heads=4)
META = torch.device("meta")

needs_cuda = pytest.mark.skipif(missing_cuda() is not None, reason=str(missing_cuda()))


def spec(seq_len: int) -> PatternSpec:
    return BASE._replace(seq_len=seq_len)


def words_bytes(*seq_lens: int) -> int:
    return sum(Pattern.plan(spec(n)).nbytes for n in seq_lens)


def seq_len_of(words: torch.Tensor) -> int:
    """Header::seq_len, the fifth word (pattern_layout.h)."""
    return int(words[4])


def test_second_lookup_returns_the_same_words():
    cache = PatternCache()
    first, first_words = cache.lookup(BASE)
    second, second_words = cache.lookup(BASE._replace())
    assert first is second and first_words is second_words
    assert first_words.dtype == torch.int32 and seq_len_of(first_words) == BASE.seq_len
    assert torch.equal(first_words, Pattern.plan(BASE).words)


def test_statistics_count():
    cache = PatternCache()
    assert cache.statistics().hit_rate == 0.0
    for n in (40, 41, 40, 40):
        cache.lookup(spec(n))
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.evictions) == (2, 2, 0)
    assert statistics.hit_rate == 0.5
    assert (statistics.size, statistics.bytes) == (2, words_bytes(40, 41))
    assert statistics.transfers == 0


def test_entries_are_bounded_and_the_least_recently_used_goes_first():
    cache = PatternCache(max_entries=2)
    for n in (40, 41, 40, 42):
        cache.lookup(spec(n))
    assert spec(40) in cache and spec(42) in cache and spec(41) not in cache
    assert len(cache) == 2
    statistics = cache.statistics()
    assert (statistics.evictions, statistics.bytes) == (1, words_bytes(40, 42))


def test_bytes_are_bounded():
    cache = PatternCache(max_bytes=words_bytes(40, 41))
    for n in (40, 41, 42):
        cache.lookup(spec(n))
        assert cache.statistics().bytes <= cache.max_bytes
    assert spec(40) not in cache and spec(42) in cache


def test_a_pattern_beyond_the_budget_is_still_returned():
    cache = PatternCache(max_bytes=1)
    _, words = cache.lookup(BASE)
    assert seq_len_of(words) == BASE.seq_len
    statistics = cache.statistics()
    assert (statistics.size, statistics.bytes, statistics.evictions) == (0, 0, 1)


def test_one_transfer_per_device_kept_with_the_entry():
    cache = PatternCache()
    _, host = cache.lookup(BASE)
    _, first = cache.lookup(BASE, META)
    _, second = cache.lookup(BASE, META)
    assert first is second and first.device == META and host.device.type == "cpu"
    statistics = cache.statistics()
    assert (statistics.transfers, statistics.misses, statistics.hits) == (1, 1, 2)
    assert statistics.bytes == 2 * words_bytes(BASE.seq_len)


def test_copies_count_towards_the_byte_budget_and_go_with_the_entry():
    cache = PatternCache(max_bytes=words_bytes(40, 41) + words_bytes(41) // 2)
    cache.lookup(spec(40))
    cache.lookup(spec(41))
    cache.lookup(spec(41), META)
    assert spec(40) not in cache
    assert cache.statistics().bytes == 2 * words_bytes(41)
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_clear_forgets_patterns_and_counts():
    cache = PatternCache()
    cache.lookup(BASE)
    cache.clear()
    assert len(cache) == 0 and dataclasses.astuple(cache.statistics()) == (0,) * 6


def test_resize_evicts_what_no_longer_fits():
    cache = PatternCache()
    for n in range(40, 48):
        cache.lookup(spec(n))
    cache.resize(max_entries=3)
    assert (len(cache), cache.max_entries) == (3, 3)
    cache.resize(max_bytes=words_bytes(47))
    assert len(cache) == 1 and spec(47) in cache
    assert cache.statistics().evictions == 7


@pytest.mark.parametrize("name", ["max_entries", "max_bytes"])
def test_negative_capacities_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        PatternCache(**{name: -1})
    cache = PatternCache()
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        cache.resize(**{name: -1})


def test_every_field_of_the_specification_is_in_the_key():
    other = {
        "seq_len": 49,
        "branches": make_branches([16, 32], [1, 4]),
        "head_offsets": "blocked",
        "heads": 8,
        "kv_heads": 2,
        "is_causal": True,
        "padding": "zeros",
        "queries": (0, 16),
        "keys": (16, 48),
        "row_tile": 32,
    }
    assert set(other) == set(PatternSpec._fields)
    cache = PatternCache()
    cache.lookup(BASE)
    for count, (name, value) in enumerate(other.items(), start=2):
        _, words = cache.lookup(BASE._replace(**{name: value}))
        assert cache.statistics().misses == count, name
        assert words is not cache.lookup(BASE)[1], name


def test_every_argument_that_changes_the_pattern_is_looked_up_anew():
    cache = PatternCache()
    base = {"segment_lengths": [16, 32], "dilation_rates": [1, 2], "pattern_cache": cache}

    def misses(shape=(), **options):
        before = cache.statistics().misses
        dilated_attention(*make_qkv(**{"seq_len": 48, **dict(shape)}), **{**base, **options})
        return cache.statistics().misses - before

    assert misses() == 1
    for options in (
        {"segment_lengths": [16, 24]},
        {"dilation_rates": [2, 2]},
        {"head_offsets": "blocked"},
        {"head_offsets": [[0, 0, 0, 0], [1, 1, 1, 1]]},
        {"is_causal": True},
        {"padding": "zeros"},
        {"shape": {"seq_len": 47}},
        {"shape": {"heads": 8}},
        {"shape": {"kv_heads": 2}},
    ):
        assert misses(**options) == 1, options
    for options in (
        {},
        {"scale": 0.5},
        {"dropout_p": 0.5},
        {"return_lse": True},
        {"shape": {"batch": 3}},
        {"shape": {"head_dim": 8}},
        {"shape": {"dtype": torch.float32}},
    ):
        assert misses(**options) == 0, options


def test_a_wrong_specification_leaves_the_cache_as_it_was():
    cache = PatternCache()
    with pytest.raises(ValueError, match="kv_heads"):
        cache.lookup(BASE._replace(kv_heads=3))
    assert len(cache) == 0 and cache.statistics().misses == 1
    cache.lookup(BASE)
    assert len(cache) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_empty_with_the_same_capacity(duplicate):
    cache = PatternCache(max_entries=7, max_bytes=12345678)
    cache.lookup(BASE)
    twin = duplicate(cache)
    assert (twin.max_entries, twin.max_bytes, len(twin)) == (7, 12345678, 0)
    assert twin.lookup(BASE)[1] is not cache.lookup(BASE)[1]


def test_the_default_cache_is_one_object():
    assert default_pattern_cache() is default_pattern_cache()


def test_patterns_planned_in_inference_mode_can_train_later():
    cache = PatternCache()
    q, k, v = make_qkv(seq_len=48, requires_grad=True)
    options = {"head_offsets": "blocked", "pattern_cache": cache}
    with torch.inference_mode():
        dilated_attention(q, k, v, [16, 32], [1, 2], **options)
    dilated_attention(q, k, v, [16, 32], [1, 2], **options).sum().backward()
    assert cache.statistics().hits == 1 and torch.isfinite(q.grad).all()


@pytest.fixture
def eager_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_thread_switches")
def test_concurrent_use_loses_no_count_and_mixes_no_patterns():
    cache = PatternCache(max_entries=5)
    lengths, threads, lookups = range(40, 52), 8, 300
    wrong: list[object] = []
    start = threading.Barrier(threads)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        try:
            for _ in range(lookups):
                n = rng.choice(lengths)
                pattern, words = cache.lookup(
                    spec(n), META if rng.random() < 0.3 else torch.device("cpu")
                )
                if pattern.spec != spec(n) or (words.is_cpu and seq_len_of(words) != n):
                    wrong.append((n, pattern.spec))
                if len(cache) > 5:
                    wrong.append(len(cache))
                if rng.random() < 0.02:
                    cache.resize(max_entries=rng.randint(3, 5))
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    statistics = cache.statistics()
    assert statistics.hits + statistics.misses == threads * lookups
    assert statistics.hits > 0 and statistics.evictions > 0
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.lookup(BASE),
        lambda cache: cache.lookup(spec(99)),
        lambda cache: cache.resize(max_entries=1),
        PatternCache.clear,
        PatternCache.statistics,
        len,
        lambda cache: BASE in cache,
    ],
    ids=["hit", "miss", "resize", "clear", "statistics", "len", "in"],
)
def test_every_method_waits_for_the_lock(use):
    cache = PatternCache()
    cache.lookup(BASE)
    worker = threading.Thread(target=use, args=(cache,))
    with cache._lock:
        worker.start()
        worker.join(timeout=0.05)
        assert worker.is_alive()
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_report_counts_pairs():
    pattern = Pattern.plan(BASE)
    report = pattern.report()
    # A head, of 48 positions: three segments of 16; of the lattice, 16 positions of the first
    # segment of 32 and 8 of the cut one, of which pairs within 16 positions are in both branches.
    dense, dilated, shared = 3 * 16**2, 16**2 + 8**2, 3 * 8**2
    assert report["nominal"] == 4 * (dense + dilated)
    assert report["distinct"] == 4 * (dense + dilated - shared)
    assert report["computed"] >= report["distinct"]
    assert report["bytes"] == pattern.nbytes


@needs_cuda
def test_words_reach_the_gpu_once_and_other_streams_wait_for_them():
    cache, device = PatternCache(), torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(4096, 4096, device=device)
    first_stream, second_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
    with torch.cuda.stream(first_stream):
        for _ in range(20):
            busy = busy @ busy
        _, first = cache.lookup(BASE, device)
    with torch.cuda.stream(second_stream):
        _, second = cache.lookup(BASE, device)
        seen = second.clone()
    torch.cuda.synchronize()
    assert first is second and cache.statistics().transfers == 1
    assert torch.equal(seen.cpu(), Pattern.plan(BASE).words)


@needs_cuda
def test_cuda_graphs_need_a_warm_pattern_and_then_keep_it():
    cache, device = PatternCache(), torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="before the capture"), torch.cuda.graph(graph):
        cache.lookup(BASE, device)
    torch.cuda.synchronize()

    cache.lookup(BASE, device)
    out = torch.empty_like(cache.lookup(BASE, device)[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(cache.lookup(BASE, device)[1])
    cache.resize(max_entries=0)
    junk = [torch.full_like(out, -1) for _ in range(64)]
    graph.replay()
    assert torch.equal(out.cpu(), Pattern.plan(BASE).words) and len(junk) == 64
