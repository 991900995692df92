"""Planning is bounded by bytes and steps, and can be interrupted."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import torch

from dilated_attention_pytorch import PatternCache, dilated_attention
from dilated_attention_pytorch.pattern import (
    Pattern,
    PatternSpec,
    Sequences,
    make_branches,
    max_pattern_bytes,
    set_max_pattern_bytes,
)
from dilated_attention_pytorch.pattern.caches import base_cache
from tests.conftest import make_qkv

from .caches.machines import FakeMachine

PRIMES = [2, 3, 5, 7, 11, 13, 17, 19]
LONG = PatternSpec(10**6, make_branches([10**6] * 8, PRIMES), "interleaved", 8, 8)


@pytest.fixture
def restored_limit() -> Iterator[None]:
    before = max_pattern_bytes()
    yield
    set_max_pattern_bytes(before)


def test_time_does_not_grow_with_the_square_of_the_heads():
    begin = time.monotonic()
    Pattern.plan(PatternSpec(60, make_branches([7, 11], [1, 2]), "interleaved", 2**16 - 1, 1))
    assert time.monotonic() - begin < 15  # half a second; about a minute if it did


@pytest.mark.usefixtures("restored_limit")
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_the_limit_is_on_the_bytes_of_the_words(kv_heads):
    spec = PatternSpec(3000, make_branches([500, 3000], [3, 7]), "interleaved", 4, kv_heads)
    words = Pattern.plan(spec).words
    set_max_pattern_bytes(words.nbytes)
    assert torch.equal(Pattern.plan(spec).words, words)
    set_max_pattern_bytes(words.nbytes // 2)
    with pytest.raises(ValueError, match=rf"dilation_rates: .* {words.nbytes // 2} bytes .*3000"):
        Pattern.plan(spec)
    q, k, v = make_qkv(3000, 4, 8, kv_heads=kv_heads)
    with pytest.raises(ValueError, match="dilation_rates: "):
        torch.ops.dilated.attention(q, k, v, [500, 3000], [3, 7])


@pytest.mark.usefixtures("restored_limit")
@pytest.mark.parametrize(
    "spec",
    [
        LONG,
        LONG._replace(kv_heads=1),
        PatternSpec(2**31 - 2, make_branches([1], [1]), "interleaved", 1, 1),
        PatternSpec(2**31 - 2, make_branches([2**31 - 2], [2**31 - 1]), "interleaved", 1, 1),
        PatternSpec(10**6, make_branches([10**6] * 16, [2, 3, 5, 7] * 4), "interleaved", 512, 512),
    ],
)
def test_what_is_too_large_is_refused_soon(spec):
    set_max_pattern_bytes(2**20)
    with pytest.raises(ValueError, match="dilation_rates: must give a pattern of at most 1048576 "):
        Pattern.plan(spec)


@pytest.mark.usefixtures("restored_limit")
def test_a_small_pattern_of_many_positions_is_refused_for_its_steps_alone():
    n = 4_000_001
    spec = PatternSpec(n, make_branches([2048, 131072, n], [1, 64, 7808]), "interleaved", 1, 1)
    set_max_pattern_bytes(2**26)
    assert Pattern.plan(spec).nbytes < 2**22
    set_max_pattern_bytes(2**22)
    with pytest.raises(ValueError, match=r"dilation_rates: must be planned in .* steps .*4000001"):
        Pattern.plan(spec)


def test_the_limit_is_a_positive_integer():
    with pytest.raises(ValueError, match="nbytes must be at least 1, got 0"):
        set_max_pattern_bytes(0)
    with pytest.raises(TypeError, match=r"nbytes must be an integer, got 1\.5"):
        set_max_pattern_bytes(1.5)
    with pytest.raises(TypeError, match="nbytes must be an integer, got True"):
        set_max_pattern_bytes(True)


def test_planning_can_be_interrupted():
    class Interrupt(Exception):
        pass

    def handle(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handle)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        cache = PatternCache()
        timer.start()
        with pytest.raises(Interrupt):
            cache.lookup(LONG)
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)
    assert LONG not in cache and not cache._planning


def test_a_pattern_above_the_cache_s_limit_warns_once(monkeypatch):
    monkeypatch.setattr(base_cache, "_has_warned", False)
    machine = FakeMachine()
    spec = PatternSpec(300, make_branches([100], [1]), "interleaved", 1, 1)
    nbytes = Pattern.plan(spec).nbytes
    cache = PatternCache(max_bytes=2 * nbytes - 1)
    machine.attach(cache)
    q, _, _ = make_qkv(300, 1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.lookup(spec)  # fits, until it has a copy
        cache.lookup(spec)
        PatternCache(max_entries=0).lookup(spec)
        cache.clear()
    with pytest.warns(
        RuntimeWarning, match=r"default_pattern_cache\(\)\.resize\(max_bytes="
    ) as caught:
        cache.lookup(spec, machine.device)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.lookup(spec, machine.device)
        dilated_attention(q, q, q, [100], [1], pattern_cache=PatternCache(max_bytes=1))


@pytest.mark.usefixtures("restored_limit")
def test_the_limit_is_on_where_columns_lie_too():
    places = Sequences([(i, 1) for i in range(2**16)])
    spec = PatternSpec(2**16, make_branches([4], [1]), "interleaved", 1, 1, sequences=places)
    part = spec._replace(queries=(0, 10))
    set_max_pattern_bytes(Pattern.plan(part).nbytes)
    Pattern.plan(part)
    set_max_pattern_bytes(2**17)
    with pytest.raises(ValueError, match="at most 131072 bytes"):
        Pattern.plan(part)
