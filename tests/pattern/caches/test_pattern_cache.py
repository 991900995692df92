"""V2's cache, beyond the contract: copies kept with the entry, its three options, the reports."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import PatternCache
from dilated_attention_pytorch.pattern import Pattern

from .machines import FakeMachine
from .test_cache_contract import BASE, META, seq_len_of, spec, words_bytes


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def fake_cache(machine: FakeMachine, **settings: object) -> PatternCache:
    cache = PatternCache(**settings)
    machine.attach(cache)
    return cache


def test_one_transfer_per_device_kept_with_the_entry(machine):
    cache = fake_cache(machine)
    for device in (machine.device, META):
        _, first = cache.lookup(BASE, device)
        _, second = cache.lookup(BASE, device)
        assert first is second
    statistics = cache.statistics()
    assert (statistics.transfers, statistics.misses, statistics.hits) == (2, 1, 3)
    assert statistics.bytes_transferred == 2 * words_bytes(BASE.seq_len)
    assert statistics.device_bytes >= 2 * words_bytes(BASE.seq_len)
    assert statistics.bytes == statistics.device_bytes + words_bytes(BASE.seq_len)


def test_copies_count_towards_the_byte_budget_and_go_with_the_entry():
    cache = PatternCache(max_bytes=words_bytes(40, 41) + words_bytes(41) // 2)
    cache.lookup(spec(40))
    cache.lookup(spec(41))
    cache.lookup(spec(41), META)
    assert spec(40) not in cache
    assert cache.statistics().bytes == 2 * words_bytes(41)
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_announced_patterns_are_copied_one_by_one_or_in_batches(machine):
    lengths = [40, 41, 42, 600, 601]
    sizes = {words_bytes(n).bit_length() for n in lengths}
    assert len(sizes) == 2  # two classes of similar size
    for batch, transfers in ((False, 5), (True, 2)):
        cache = fake_cache(machine, batch_transfers=batch)
        cache.prefetch([spec(n) for n in lengths], machine.device)
        assert cache.statistics().transfers == transfers
        for n in lengths:
            machine.read(cache.lookup(spec(n), machine.device)[1])
        assert cache.statistics().transfers == transfers
        assert sorted(seq_len_of(words) for words in machine.finish()) == lengths


def test_memory_of_a_batch_counts_until_its_last_pattern_goes(machine):
    cache = fake_cache(machine, batch_transfers=True)
    cache.prefetch([spec(40), spec(41)], machine.device)
    block = cache.statistics().bytes - words_bytes(40, 41)
    assert block >= words_bytes(40, 41)
    cache.resize(max_entries=1)
    assert cache.statistics().bytes == words_bytes(41) + block
    cache.resize(max_entries=0)
    assert cache.statistics().bytes == 0


def test_a_pattern_in_use_outlives_what_was_announced_since(machine):
    cache = fake_cache(machine, max_entries=2)
    for _ in range(2):
        cache.lookup(spec(40))
    cache.prefetch([spec(41)], machine.device)
    cache.lookup(spec(40))
    cache.lookup(spec(42))
    assert spec(40) in cache and spec(41) not in cache


def test_announced_patterns_are_the_last_to_go(machine):
    cache = fake_cache(machine, max_entries=2)
    cache.lookup(spec(40))
    cache.lookup(spec(41))
    cache.prefetch([spec(40)], machine.device)
    cache.lookup(spec(42))
    assert spec(40) in cache and spec(41) not in cache


@pytest.mark.parametrize(("async_transfers", "waits"), [(True, 0), (False, 2)])
def test_the_host_waits_for_copies_where_asked(machine, async_transfers, waits):
    cache = fake_cache(machine, async_transfers=async_transfers)
    assert words_bytes(40) < words_bytes(200)
    done = []
    for n in (40, 200):
        words = cache.lookup(spec(n), machine.device)[1]
        done.append(seq_len_of(words) == n)  # read by the host, without waiting
        machine.finish()
    assert sum(done) == waits


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


def test_words_are_int32_and_on_the_host():
    words = Pattern.plan(BASE).words
    assert words.dtype == torch.int32 and words.is_cpu
