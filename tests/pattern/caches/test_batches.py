"""Batches of sequences in caches: joined of lengths that are kept, bounded and counted."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from dilated_attention_pytorch.pattern import (
    Pattern,
    PatternSpec,
    Sequences,
    TieredPatternCache,
    make_branches,
)

from .machines import Machine, Make

BASE = PatternSpec(0, make_branches([16, 32], [1, 2]), "blocked", heads=4, kv_heads=2)


def batch(*lengths: int, **fields: object) -> PatternSpec:
    """Sequences without gaps."""
    places = [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    return BASE._replace(seq_len=sum(lengths), sequences=Sequences(places), **fields)


def one(length: int) -> PatternSpec:
    return BASE._replace(seq_len=length)


def test_a_batch_is_found_again(make: Make) -> None:
    cache = make()
    first, words = cache.lookup(batch(40, 41, 40))
    again, same = cache.lookup(batch(40, 41, 40))
    assert again is first and same is words
    assert words.equal(Pattern.plan(batch(40, 41, 40)).words)
    statistics = cache.statistics()
    assert (statistics.misses, statistics.hits) == (1, 1)  # of batches; lengths are no look-ups
    for other in (batch(41, 40, 40), batch(40, 41, 39), batch(40, 41, 40, is_causal=True)):
        assert cache.lookup(other)[0] is not first


def test_lengths_are_planned_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, plan_parts, planned = make(), Pattern.plan_parts, list[int]()

    def count(spec: PatternSpec, parts: Sequence[PatternSpec]) -> list[Pattern]:
        planned.extend(part.seq_len for part in parts)
        return plan_parts(spec, parts)

    monkeypatch.setattr(Pattern, "plan_parts", staticmethod(count))
    cache.lookup(one(41))
    for lengths in ((40, 41, 40), (41, 40), (0, 40), (0,), (), (41, 42, 0, 40)):
        words = cache.lookup(batch(*lengths))[1]
        assert words.equal(Pattern.plan(batch(*lengths)).words)
    assert planned == [40, 0, 42]
    assert one(40) in cache and batch(0) in cache and len(cache) == 4 + 6


def test_batches_are_bounded_as_others_are(make: Make) -> None:
    cache = make(max_entries=3)
    for lengths in ((40, 41), (41, 42), (43,)):
        cache.lookup(batch(*lengths))
        assert len(cache) <= 3
    assert batch(43) in cache and batch(40, 41) not in cache
    cache.resize(max_bytes=cache.statistics().bytes - 1)
    assert len(cache) == 2
    none = make(max_entries=0)
    assert none.lookup(batch(40, 41))[1].equal(Pattern.plan(batch(40, 41)).words)


def test_a_length_that_a_borrower_wrote_into_is_planned_anew(make: Make) -> None:
    cache = make()
    cache.lookup(one(40))[0].words.zero_()
    assert cache.lookup(batch(40, 41))[1].equal(Pattern.plan(batch(40, 41)).words)


def test_wrong_batches_leave_nothing_behind(make: Make) -> None:
    cache = make()
    wrong = BASE._replace(seq_len=50, sequences=Sequences([(0, 40), (30, 20)]))
    with pytest.raises(ValueError, match="sequences: must ascend and not overlap"):
        cache.lookup(wrong)
    with pytest.raises(TypeError, match="sequences must be Sequences or None"):
        cache.lookup(BASE._replace(sequences=((0, 5),)))  # type: ignore[arg-type]
    assert wrong not in cache
    assert cache.lookup(batch(40, 20))[1].equal(Pattern.plan(batch(40, 20)).words)


def test_threads_that_share_lengths_end(make: Make) -> None:
    cache, failures = make(max_entries=5), list[BaseException]()
    batches = [batch(40, 41), batch(41, 40), batch(40, 42, 41), batch(42, 40), batch(43, 41)]
    expected = [Pattern.plan(spec).words for spec in batches]

    def work(first: int) -> None:
        try:
            for i in range(60):
                index = (first + i) % len(batches)
                assert cache.lookup(batches[index])[1].equal(expected[index])
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_the_next_batch_is_brought_to_the_device(make: Make, machine: Machine) -> None:
    cache = make()
    machine.attach(cache)
    cache.announce([batch(40, 41), batch(42)], machine.device)
    cache.drain()
    before = cache.statistics()
    for spec in (batch(40, 41), batch(42)):
        machine.read(cache.lookup(spec, machine.device)[1])
    after = cache.statistics()
    assert (after.misses, after.transfers) == (0, before.transfers)
    # Lengths stay on the host.
    held = [Pattern.plan(spec) for spec in (batch(40, 41), batch(42))]
    assert before.bytes_transferred == sum(pattern.nbytes for pattern in held)
    for words, pattern in zip(machine.finish(), held, strict=True):
        assert words.equal(pattern.words)


def test_batches_that_repeat_are_copied_ahead(machine: Machine) -> None:
    cache = TieredPatternCache(promote_after=100)
    machine.attach(cache)
    for _ in range(6):
        for spec in (batch(40, 41), batch(42), batch(41, 42, 40)):
            machine.read(cache.lookup(spec, machine.device)[1])
            cache.drain()
            machine.finish()
    assert cache.statistics().prefetch_hits > 0


def test_a_lent_batch_serves_the_operator(make: Make) -> None:
    cache, spec = make(), batch(40, 41)
    x = torch.randn(1, 81, 4, 8, dtype=torch.float64)
    pattern, words = cache.lookup(spec)
    assert spec.sequences is not None
    options = {"sequences": spec.sequences.tensor, "head_offsets": pattern.head_offsets}
    call = (x, x[:, :, :2], x[:, :, 2:], [16, 32], [1, 2])
    out, _ = torch.ops.dilated.attention(*call, pattern=words, **options)
    assert out.equal(torch.ops.dilated.attention(*call, **options)[0])
