"""What every cache must do: bounded, counted, keyed by all, right on every device and stream.

`device_words` tests run on a model of a GPU that takes the worst order, and on a GPU.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.pattern import (
    BasePatternCache,
    Pattern,
    PatternSpec,
    Sequences,
    make_branches,
)
from dilated_attention_pytorch.pattern.caches.turn import Turn
from tests.conftest import make_qkv

from .machines import CudaMachine, FakeMachine, Machine

BASE = PatternSpec(48, make_branches([16, 32], [1, 2]), "interleaved", heads=4, kv_heads=4)
CPU, META = torch.device("cpu"), torch.device("meta")


def spec(seq_len: int) -> PatternSpec:
    return BASE._replace(seq_len=seq_len)


def words_bytes(*seq_lens: int) -> int:
    return sum(Pattern.plan(spec(n)).nbytes for n in seq_lens)


def seq_len_of(words: torch.Tensor) -> int:
    """Header::seq_len, the fifth word (pattern_layout.h)."""
    return int(words[4])


def drain(cache: BasePatternCache) -> None:
    """What a cache does in the background is done."""
    cache.drain()


def warm(cache: BasePatternCache, machine: Machine, *seq_lens: int) -> None:
    """The patterns are on the device for good, their copies enqueued."""
    cache.prefetch([spec(n) for n in seq_lens], machine.device)
    drain(cache)


# Host


def test_second_lookup_returns_the_same_words(make):
    cache = make()
    first, first_words = cache.lookup(BASE)
    second, second_words = cache.lookup(BASE._replace())
    assert first is second and first_words is second_words is first.words
    assert first_words.dtype == torch.int32 and seq_len_of(first_words) == BASE.seq_len
    assert torch.equal(first_words, Pattern.plan(BASE).words)


def test_lookups_are_counted(make):
    cache = make()
    assert cache.statistics().hit_rate == 0.0
    for n in (40, 41, 40, 40):
        cache.lookup(spec(n))
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.evictions) == (2, 2, 0)
    assert statistics.hit_rate == 0.5
    assert (statistics.size, statistics.bytes) == (2, words_bytes(40, 41))
    assert (statistics.transfers, statistics.transfer_seconds) == (0, 0.0)
    assert (statistics.device_bytes, statistics.waiting_seconds) == (0, 0.0)
    assert statistics.planning_seconds > 0.0


def test_entries_are_bounded_and_the_least_recently_used_goes_first(make):
    cache = make(max_entries=2)
    for n in (40, 41, 40, 42):
        cache.lookup(spec(n))
    assert spec(40) in cache and spec(42) in cache and spec(41) not in cache
    assert len(cache) == 2
    statistics = cache.statistics()
    assert (statistics.evictions, statistics.bytes) == (1, words_bytes(40, 42))


def test_bytes_are_bounded(make):
    cache = make(max_bytes=words_bytes(40, 41))
    for n in (40, 41, 42):
        cache.lookup(spec(n))
        assert cache.statistics().bytes <= cache.max_bytes
    assert spec(40) not in cache and spec(42) in cache


@pytest.mark.filterwarnings("ignore:a pattern of .* bytes:RuntimeWarning")
def test_a_pattern_beyond_the_budget_is_still_returned(make, machine):
    cache = make(max_bytes=1)
    machine.attach(cache)
    _, words = cache.lookup(BASE)
    assert seq_len_of(words) == BASE.seq_len
    _, words = cache.lookup(BASE, machine.device)
    machine.read(words)
    statistics = cache.statistics()
    assert (statistics.size, statistics.bytes, statistics.evictions) == (0, 0, 2)
    assert torch.equal(*machine.finish(), Pattern.plan(BASE).words)


def test_clear_forgets_patterns_and_counts(make):
    cache = make()
    cache.lookup(BASE)
    cache.lookup(BASE, META)
    cache.clear()
    assert len(cache) == 0 and cache.statistics() == make().statistics()


def test_resize_evicts_what_no_longer_fits(make):
    cache = make()
    for n in range(40, 48):
        cache.lookup(spec(n))
    cache.resize(max_entries=3)
    assert (len(cache), cache.max_entries) == (3, 3)
    cache.resize(max_bytes=words_bytes(47))
    assert len(cache) == 1 and spec(47) in cache
    assert cache.statistics().evictions == 7


@pytest.mark.parametrize("name", ["max_entries", "max_bytes"])
def test_bad_capacities_are_refused(make, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        make(**{name: -1})
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 1.5"):
        make(**{name: 1.5})
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got -1"):
        make().resize(**{name: -1})


def test_every_field_of_the_specification_is_in_the_key(make):
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
        "directions": "forward",
        "sequences": Sequences([(0, 40)]),
        "far_keys": (24, 48),
        "rows": "near",
    }
    assert set(other) == set(PatternSpec._fields)
    cache = make()
    cache.lookup(BASE)
    for count, (name, value) in enumerate(other.items(), start=2):
        is_far = name in ("far_keys", "rows")
        base = BASE._replace(keys=(0, 24), directions="forward") if is_far else BASE
        _, words = cache.lookup(base._replace(**{name: value}))
        assert cache.statistics().misses == count, name
        assert words is not cache.lookup(BASE)[1], name


def test_a_wrong_specification_leaves_the_cache_as_it_was(make):
    cache = make()
    for _ in range(2):
        with pytest.raises(ValueError, match="kv_heads"):
            cache.lookup(BASE._replace(kv_heads=3))
    assert len(cache) == 0 and cache.statistics().misses == 2
    cache.lookup(BASE)
    assert len(cache) == 1


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_empty_with_the_same_settings(make, duplicate):
    cache = make(max_entries=7, max_bytes=12345678)
    cache.lookup(BASE)
    twin = duplicate(cache)
    assert type(twin) is type(cache) and twin._settings() == cache._settings()
    assert (twin.max_entries, twin.max_bytes, len(twin)) == (7, 12345678, 0)
    assert twin.lookup(BASE)[1] is not cache.lookup(BASE)[1]
    assert "max_entries=7" in repr(twin)


def test_announced_patterns_are_there_soon(make):
    cache = make()
    cache.announce([spec(40), spec(41), spec(40)], CPU)
    cache.drain()
    assert len(cache) == 2 and cache.statistics().hits == 0
    cache.lookup(spec(41))
    assert cache.statistics().hits == 1
    cache.announce([spec(40)._replace(kv_heads=3)], CPU)
    with pytest.raises(ValueError, match="kv_heads"):
        cache.drain()


def test_results_are_those_without_a_cache(make, device):
    cache = make()
    q, k, v = make_qkv(61, dtype=torch.float32, device=device)
    call = {"segment_lengths": [16, 32], "dilation_rates": [1, 2], "head_offsets": "blocked"}
    expected = dilated_attention(q, k, v, **call, pattern_cache=False)
    for _ in range(5):
        assert torch.equal(dilated_attention(q, k, v, **call, pattern_cache=cache), expected)
    assert (cache.statistics().misses, cache.statistics().hits) == (1, 4)


def test_every_argument_that_changes_the_pattern_is_looked_up_anew(make):
    cache = make()
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


def test_patterns_planned_in_inference_mode_can_train_later(make):
    cache = make()
    q, k, v = make_qkv(seq_len=48, requires_grad=True)
    options = {"head_offsets": "blocked", "pattern_cache": cache}
    with torch.inference_mode():
        dilated_attention(q, k, v, [16, 32], [1, 2], **options)
    dilated_attention(q, k, v, [16, 32], [1, 2], **options).sum().backward()
    assert cache.statistics().hits == 1 and torch.isfinite(q.grad).all()


# Devices


def test_words_reach_the_right_device(make, machine):
    cache = make()
    machine.attach(cache)
    pattern, host = cache.lookup(BASE)
    _, words = cache.lookup(BASE, machine.device)
    _, again = cache.lookup(BASE)
    assert host is pattern.words and again.is_cpu and torch.equal(host, again)
    machine.read(words)
    assert torch.equal(*machine.finish(), pattern.words)
    assert cache.lookup(BASE, META)[1].device == META
    assert cache.lookup(BASE, torch.device("cpu", 0))[1].device == CPU


def test_a_copy_that_is_kept_is_made_once(make, machine):
    cache = make()
    machine.attach(cache)
    warm(cache, machine, 40, 41)
    transfers = cache.statistics().transfers
    for n in (40, 41, 40, 41):
        _, words = cache.lookup(spec(n), machine.device)
        machine.read(words)
    statistics = cache.statistics()
    assert statistics.transfers == transfers > 0
    assert statistics.bytes_transferred == words_bytes(40, 41)
    assert statistics.transfer_seconds > 0.0 and statistics.hits == 4
    assert [seq_len_of(words) for words in machine.finish()] == [40, 41, 40, 41]


def test_readers_on_other_streams_wait_for_the_copy(make, machine):
    cache = make()
    machine.attach(cache)
    with machine.stream(1):
        machine.keep_busy()
        machine.read(cache.lookup(BASE, machine.device)[1])
    for stream in (2, 3, 0, 2):
        with machine.stream(stream):
            machine.read(cache.lookup(BASE, machine.device)[1])
    seen = machine.finish()
    assert len(seen) == 5 and all(torch.equal(words, Pattern.plan(BASE).words) for words in seen)


def test_readers_wait_for_copies_made_ahead(make, machine):
    cache = make()
    machine.attach(cache)
    warm(cache, machine, 40, 41, 42)
    for stream in (0, 1):
        with machine.stream(stream):
            for n in (42, 40, 41):
                machine.read(cache.lookup(spec(n), machine.device)[1])
    seen = machine.finish()
    assert sorted(seq_len_of(words) for words in seen) == [40, 40, 41, 41, 42, 42]
    for words in seen:
        assert torch.equal(words, Pattern.plan(spec(seq_len_of(words))).words)


def test_readers_also_wait_after_the_copy_is_known_to_be_done(make, machine):
    cache = make()
    machine.attach(cache)
    warm(cache, machine, 40)
    machine.finish()
    for stream in (0, 1, 1):
        with machine.stream(stream):
            machine.read(cache.lookup(spec(40), machine.device)[1])
    assert [seq_len_of(words) for words in machine.finish()] == [40] * 3


def test_memory_is_not_reused_before_its_last_reader_is_done(make, machine):
    cache = make()
    machine.attach(cache)
    warm(cache, machine, 40)
    for stream in (1, 0, 2):
        with machine.stream(stream):
            machine.keep_busy()
            machine.read(cache.lookup(spec(40), machine.device)[1])
    cache.resize(max_entries=0)
    gc.collect()
    shape = Pattern.plan(spec(40)).words
    junk = [
        torch.full_like(shape, -1, device=machine.device) for _ in range(64 * _is_real(machine))
    ]
    assert [seq_len_of(words) for words in machine.finish()] == [40] * 3
    assert len(junk) in (0, 64)


def _is_real(machine: Machine) -> bool:
    return isinstance(machine, CudaMachine)


def test_eviction_under_use_gives_right_words(make, machine):
    cache = make(max_entries=2)
    machine.attach(cache)
    rng = random.Random(0)
    lengths = [rng.choice(range(40, 46)) for _ in range(120)]
    for n in lengths:
        with machine.stream(rng.randrange(3)):
            machine.read(cache.lookup(spec(n), machine.device)[1])
        if rng.random() < 0.2:
            cache.prefetch([spec(rng.choice(lengths))], machine.device)
        gc.collect(0)
    drain(cache)
    seen = machine.finish()
    assert sorted(seq_len_of(words) for words in seen) == sorted(lengths)
    for words in seen:
        assert torch.equal(words, Pattern.plan(spec(seq_len_of(words))).words)
    assert cache.statistics().evictions > 0
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_announcing_counts_as_no_lookup(make):
    cache = make()
    cache.prefetch([spec(40), spec(41), spec(40)], CPU)
    drain(cache)
    assert len(cache) == 2
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.transfers) == (0, 0, 0)
    cache.lookup(spec(41))
    assert cache.statistics().hits == 1


def test_announcing_what_can_not_be_planned_raises(make):
    cache = make()
    with pytest.raises(ValueError, match="kv_heads"):
        cache.prefetch([BASE._replace(kv_heads=3)], CPU)
        drain(cache)
    drain(cache)


def test_graphs_need_a_warm_pattern_and_then_keep_it(make, machine):
    cache = make()
    machine.attach(cache)
    with machine.stream(1):
        with pytest.raises(RuntimeError, match="before the capture"), machine.graph():
            cache.lookup(BASE, machine.device)
        with pytest.raises(RuntimeError, match="captured"), machine.graph():
            cache.prefetch([BASE], machine.device)
    warm(cache, machine, BASE.seq_len)
    machine.finish()
    with machine.stream(1), machine.graph() as replay:
        machine.read(cache.lookup(BASE, machine.device)[1])
    cache.resize(max_entries=0)
    gc.collect()
    with machine.stream(1):
        replay()
    assert torch.equal(*machine.finish(), Pattern.plan(BASE).words)


# Threads and processes


@pytest.fixture
def eager_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_thread_switches")
def test_concurrent_use_loses_no_count_and_mixes_no_patterns(make):
    machine = FakeMachine()
    cache = make(max_entries=5)
    machine.attach(cache)
    lengths, threads, lookups = range(40, 52), 8, 200
    wrong: list[object] = []
    start = threading.Barrier(threads)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        try:
            for _ in range(lookups):
                n = rng.choice(lengths)
                device = rng.choice([CPU, META, machine.device])
                with machine.stream(seed):
                    pattern, words = cache.lookup(spec(n), device)
                    if device == machine.device:
                        machine.read(words)
                if pattern.spec != spec(n) or (device == CPU and seq_len_of(words) != n):
                    wrong.append((n, pattern.spec))
                if len(cache) > 5:
                    wrong.append(len(cache))
                if rng.random() < 0.02:
                    cache.resize(max_entries=rng.randint(3, 5))
                if rng.random() < 0.05:
                    cache.prefetch([spec(rng.choice(lengths))], machine.device)
        except BaseException as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    drain(cache)
    assert wrong == []
    assert all(torch.equal(x, Pattern.plan(spec(seq_len_of(x))).words) for x in machine.finish())
    statistics = cache.statistics()
    assert statistics.hits + statistics.misses == threads * lookups
    assert statistics.hits > 0 and statistics.evictions > 0
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_a_pattern_that_two_threads_miss_is_planned_once(make, monkeypatch):
    cache, planned = make(), []
    begun, go_on = threading.Event(), threading.Event()
    plan = Pattern.plan

    def slow_plan(spec: PatternSpec) -> Pattern:
        planned.append(spec)
        begun.set()
        assert go_on.wait(10)
        return plan(spec)

    monkeypatch.setattr(Pattern, "plan", staticmethod(slow_plan))
    found: list[Pattern] = []
    workers = [
        threading.Thread(target=lambda: found.append(cache.lookup(BASE)[0])) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    assert begun.wait(10)
    while cache.statistics().misses < 2:
        pass
    go_on.set()
    for worker in workers:
        worker.join(10)
    assert planned == [BASE] and found[0] is found[1]
    assert cache.statistics().waiting_seconds > 0.0


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: cache.lookup(BASE),
        lambda cache: cache.lookup(spec(99)),
        lambda cache: cache.resize(max_entries=1),
        lambda cache: cache.clear(),
        lambda cache: cache.statistics(),
        len,
        lambda cache: BASE in cache,
    ],
    ids=["hit", "miss", "resize", "clear", "statistics", "len", "in"],
)
def test_every_method_waits_for_the_lock(make, use):
    cache = make()
    cache.lookup(BASE)
    worker = threading.Thread(target=use, args=(cache,))
    with cache._lock:
        worker.start()
        worker.join(timeout=0.05)
        assert worker.is_alive()
    worker.join(timeout=10)
    assert not worker.is_alive()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_goes_on_with_the_patterns_of_the_host(make):
    machine = FakeMachine()
    cache = make()
    machine.attach(cache)
    warm(cache, machine, 40)
    cache.lookup(spec(41))
    planned = cache._entries[spec(40)].pattern
    # As if another thread were in the middle of something, and one of planning.
    turn = cache._planning[spec(42)] = Turn()
    turn.lock.acquire()
    with cache._lock:
        child = os.fork()
        if child == 0:
            code = 1
            signal.alarm(20)
            try:
                # What it can't be sure to be allowed to read is planned again.
                hits = 1 if machine.fake.is_pinned(planned.words) else 2
                _, words = cache.lookup(spec(40))
                cache.lookup(spec(41))
                cache.lookup(spec(42))
                cache.prefetch([spec(43)], CPU)
                drain(cache)
                statistics = cache.statistics()
                right = (statistics.hits, statistics.misses) == (hits, 4 - hits)
                right = right and len(cache) == 4 and not machine.fake.is_pinned(words)
                code = 0 if right and statistics.bytes == words_bytes(40, 41, 42, 43) else 2
            finally:
                os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(cache) == 2
