"""V3's cache, beyond the contract: promotion, demotion, ageing, copies made ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dilated_attention_pytorch import TieredPatternCache
from dilated_attention_pytorch.pattern import Pattern, PatternSpec

from .fake_device import SIDE_STREAM
from .machines import FakeMachine
from .test_cache_contract import BASE, CPU, META, seq_len_of, spec, words_bytes


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def fake_cache(machine: FakeMachine, **settings: object) -> TieredPatternCache:
    cache = TieredPatternCache(**settings)
    machine.attach(cache)
    return cache


def use(cache: TieredPatternCache, machine: FakeMachine, *seq_lens: int) -> None:
    for n in seq_lens:
        machine.read(cache.lookup(spec(n), machine.device)[1])
        assert [seq_len_of(words) for words in machine.finish()] == [n]


def hot(cache: TieredPatternCache, machine: FakeMachine) -> set[int]:
    return {entry.pattern.spec.seq_len for entry in cache._tiers[machine.device].copies}


def block_bytes(*seq_lens: int) -> int:
    """What copies of the patterns take on the model, which aligns them to 256 bytes."""
    return sum(-(-words_bytes(n) // 256) * 256 for n in seq_lens)


def test_a_pattern_becomes_hot_at_the_given_lookup(machine):
    cache = fake_cache(machine, promote_after=3)
    use(cache, machine, 40, 40)
    assert cache.statistics().transfers == 2 and hot(cache, machine) == set()
    use(cache, machine, 40, 40, 40)
    statistics = cache.statistics()
    assert (statistics.transfers, statistics.promotions, statistics.hot_size) == (3, 1, 1)
    assert (statistics.misses, statistics.cold_hits, statistics.hot_hits) == (1, 2, 2)
    assert statistics.hot_bytes == block_bytes(40)
    assert statistics.bytes == words_bytes(40) + block_bytes(40)


def test_the_cold_tier_is_in_page_locked_memory(machine):
    cache = fake_cache(machine, common=[spec(41)])
    use(cache, machine, 40, 41)
    for n in (40, 41):
        assert machine.fake.is_pinned(cache.lookup(spec(n))[1])
    cache.lookup(spec(42))
    assert not machine.fake.is_pinned(cache.lookup(spec(42))[1])


def test_the_hot_tier_is_bounded_on_each_device(machine):
    cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40, 41))
    other = torch.device("cuda", 1)
    for n in range(40, 50):
        use(cache, machine, *[n] * (n - 38))
        cache.lookup(spec(n), other)
        statistics = cache.statistics()
        assert statistics.hot_bytes <= 2 * cache.hot_bytes
        assert cache._tiers[machine.device].bytes <= cache.hot_bytes
    assert statistics.demotions > 0 and statistics.size == 10
    cache.resize(hot_bytes=block_bytes(40))
    assert cache._tiers[machine.device].bytes <= block_bytes(40) >= cache._tiers[other].bytes
    cache.resize(hot_bytes=0)
    assert cache.statistics().hot_bytes == 0 and cache.statistics().hot_size == 0


def test_only_what_is_looked_up_less_makes_way(machine):
    cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40, 41))
    use(cache, machine, 40, 40, 41, 41, 41, 42, 42)
    assert hot(cache, machine) == {40, 41}  # 42 has as many look-ups as 40, not more
    use(cache, machine, 42)
    assert hot(cache, machine) == {41, 42}
    assert cache.statistics().demotions == 1


def test_nothing_makes_way_for_what_would_not_fit_even_so(machine):
    cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40))
    use(cache, machine, 40, 600, 600, 600)
    assert hot(cache, machine) == {40} and cache.statistics().demotions == 0


def test_counts_age(machine):
    cache = fake_cache(
        machine, promote_after=1, hot_bytes=block_bytes(40), ageing_period=16, pin_after=None
    )
    use(cache, machine, *[40] * 12)
    use(cache, machine, *[41] * 3)
    assert hot(cache, machine) == {40}
    use(cache, machine, *[41] * 5)  # 12 look-ups count as 6 from the 17th on, then 41 has more
    assert hot(cache, machine) == {40}
    use(cache, machine, *[41] * 3)
    assert hot(cache, machine) == {41}


def test_an_evicted_pattern_is_hot_no_more(machine):
    cache = fake_cache(machine, promote_after=1, max_entries=1)
    use(cache, machine, 40, 41)
    statistics = cache.statistics()
    assert hot(cache, machine) == {41}
    assert (statistics.hot_bytes, statistics.demotions) == (block_bytes(41), 0)


def test_announced_patterns_are_hot_at_their_first_lookup(machine):
    cache = fake_cache(machine)
    cache.prefetch([spec(40), spec(41)], machine.device)
    cache.drain()
    use(cache, machine, 41, 40)
    statistics = cache.statistics()
    assert (statistics.misses, statistics.hot_hits, statistics.cold_hits) == (0, 2, 0)
    assert (statistics.prefetches, statistics.prefetch_hits) == (2, 2)
    assert statistics.wasted_prefetches == 0


def test_small_patterns_travel_in_one_transfer_and_large_ones_alone(machine, monkeypatch):
    monkeypatch.setattr(
        "dilated_attention_pytorch.pattern.caches.tiered.cache._BATCHED_BYTES",
        words_bytes(200),
    )
    lengths = [40, 600, 41, 42, 601]
    cache = fake_cache(machine)
    cache.prefetch([spec(n) for n in lengths], machine.device)
    cache.drain()
    assert machine.fake.copies == cache.statistics().transfers == 3
    use(cache, machine, *lengths)
    assert cache.statistics().transfers == 3


def test_memory_of_a_batch_counts_until_its_last_pattern_goes(machine):
    cache = fake_cache(machine)
    cache.prefetch([spec(40), spec(41)], machine.device)
    cache.drain()
    block = cache.statistics().hot_bytes
    use(cache, machine, 40, 41)
    cache.resize(hot_bytes=block - 1)
    assert cache.statistics().hot_bytes == 0 and cache.statistics().demotions == 2


def test_copies_made_ahead_are_on_a_stream_of_their_own(machine):
    cache = fake_cache(machine)
    cache.prefetch([spec(40)], machine.device)
    cache.drain()
    use(cache, machine, 41)
    assert [buffer.owner for buffer in machine.fake.buffers] == [SIDE_STREAM, 0]


def test_promised_copies_keep_their_place_until_they_are_used(machine):
    cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40))
    cache.prefetch([spec(40)], machine.device)
    cache.drain()
    use(cache, machine, *[41] * 5)
    assert hot(cache, machine) == {40}
    cache.prefetch([spec(42)], machine.device)
    cache.drain()
    assert hot(cache, machine) == {40}
    use(cache, machine, 40, 41)
    assert hot(cache, machine) == {41}
    assert cache.statistics().wasted_prefetches == 0


def test_promises_end_and_what_was_copied_in_vain_is_counted(machine):
    cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40), ageing_period=5)
    cache.prefetch([spec(40)], machine.device)
    cache.drain()
    use(cache, machine, *[41] * 7)
    assert hot(cache, machine) == {41}
    statistics = cache.statistics()
    assert (statistics.prefetch_hits, statistics.wasted_prefetches) == (0, 1)


def test_pinned_patterns_make_way_for_no_prefetched_one(machine):
    for pin_after, left in ((3, {40}), (None, {41})):
        cache = fake_cache(machine, promote_after=1, hot_bytes=block_bytes(40), pin_after=pin_after)
        use(cache, machine, *[40] * 4)
        cache.prefetch([spec(41)], machine.device)
        cache.drain()
        assert hot(cache, machine) == left


def test_a_repeated_sequence_is_copied_ahead(machine):
    for predict in (True, False):
        cache = fake_cache(machine, promote_after=100, hot_bytes=block_bytes(44), predict=predict)
        for _ in range(6):
            for n in (40, 41, 42, 43, 44):
                use(cache, machine, n)
                cache.drain()
        statistics = cache.statistics()
        # The 11th and 12th item have been followed by the same one twice: 13 to 30 are foretold.
        assert statistics.prefetch_hits == (18 if predict else 0)
        assert statistics.hot_hits == statistics.prefetch_hits


@pytest.mark.parametrize("fits", [False, True])
def test_what_is_expected_is_copied_once_and_only_if_it_fits(machine, monkeypatch, fits):
    hot_bytes = block_bytes(44) if fits else 0
    cache = fake_cache(machine, promote_after=100, hot_bytes=hot_bytes, predict=False)
    use(cache, machine, 44)
    jobs: list[Callable[[], None]] = []
    monkeypatch.setattr(cache._background, "submit", jobs.append)  # none begins meanwhile
    with cache._lock:
        for _ in range(3):
            cache._expect(spec(44), machine.device)
    assert len(jobs) == fits
    for job in jobs:
        job()
    assert hot(cache, machine) == ({44} if fits else set())
    assert not cache._expected


def test_drain_tells_what_could_not_be_begun(machine, monkeypatch):
    cache = fake_cache(machine)

    def submit(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submit)
    cache.prefetch([spec(40)], machine.device)
    use(cache, machine, 40)
    with pytest.raises(RuntimeError, match="interpreter shutdown"):
        cache.drain()
    cache.drain()


def test_a_pattern_in_the_making_is_waited_for(machine, monkeypatch):
    cache, planned = fake_cache(machine), []
    begun, go_on, plan = threading.Event(), threading.Event(), Pattern.plan

    def slow_plan(spec: PatternSpec) -> Pattern:
        planned.append(spec)
        begun.set()
        assert go_on.wait(10)
        return plan(spec)

    monkeypatch.setattr(Pattern, "plan", staticmethod(slow_plan))
    cache.prefetch([BASE], machine.device)
    assert begun.wait(10)
    threading.Timer(0.05, go_on.set).start()
    machine.read(cache.lookup(BASE, machine.device)[1])
    assert planned == [BASE]
    assert [seq_len_of(words) for words in machine.finish()] == [BASE.seq_len]


def test_common_patterns_are_planned_at_construction():
    cache = TieredPatternCache(common=[spec(40), spec(41)])
    assert len(cache) == 2
    cache.lookup(spec(40))
    assert (cache.statistics().hits, cache.statistics().misses) == (1, 0)
    with pytest.raises(ValueError, match="kv_heads"):
        TieredPatternCache(common=[BASE._replace(kv_heads=3)])


def test_other_devices_have_a_tier_too():
    cache = TieredPatternCache()
    for _ in range(5):
        assert cache.lookup(BASE, META)[1].device == META
    statistics = cache.statistics()
    assert (statistics.hot_hits, statistics.cold_hits, statistics.hot_size) == (2, 2, 1)
    cache.prefetch([spec(40), spec(41)], META)
    cache.drain()
    cache.lookup(spec(41), META)
    assert cache.statistics().prefetch_hits == 1
    assert cache.statistics().hot_bytes == words_bytes(48, 40, 41)


def test_clear_forgets_what_was_learnt(machine):
    cache = fake_cache(machine)
    use(cache, machine, *[40, 41, 42] * 3)
    cache.drain()
    cache.clear()
    use(cache, machine, 40, 41)
    cache.drain()
    assert cache.statistics().prefetches == 0


@pytest.mark.parametrize(
    ("name", "least"), [("hot_bytes", 0), ("promote_after", 1), ("ageing_period", 1)]
)
def test_bad_settings_are_refused(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        TieredPatternCache(**{name: least - 1})
    TieredPatternCache(**{name: least}).lookup(BASE, CPU)


def test_pinned_patterns_outlive_others_until_they_age():
    cache = TieredPatternCache(max_entries=2, pin_after=3)
    for n in [40] * 4 + [41, 42]:
        cache.lookup(spec(n))
    assert spec(40) in cache and spec(41) not in cache  # 40 was passed over, with 4 // 2 uses left
    cache.lookup(spec(43))
    assert spec(40) not in cache
