"""The plan of keys and values: every needed row arrives, once, and nothing else travels."""

from __future__ import annotations

import pickle
import random
from collections import Counter

import pytest

from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches
from dilated_attention_pytorch.pattern.pattern import pairs_of
from dilated_attention_pytorch.ring.plans.layout import halves, holds, place_origin, shards
from dilated_attention_pytorch.ring.plans.plan import Parcel, Plan, make_plan, peers
from tests.ring.geometry import (
    Row,
    as_a_batch,
    is_nested,
    needed_rows,
    random_shards,
    random_spec,
    rows_of,
)


def plans(spec: PatternSpec, lengths: tuple[int, ...], strategy: str) -> list[Plan]:
    return [make_plan(spec, lengths, rank, strategy) for rank in range(len(lengths))]


def sent(plan: Plan) -> dict[int, Parcel]:
    parcels = [m for r in plan.rounds for m in r.sends]
    assert len({m.peer for m in parcels}) == len(parcels)
    return {m.peer: m for m in parcels}


def received(plan: Plan) -> dict[int, Parcel]:
    parcels = [m for r in plan.rounds for m in r.receives]
    assert len({m.peer for m in parcels}) == len(parcels)
    return {m.peer: m for m in parcels}


def all_rows(parcel: Parcel) -> set[Row]:
    return {row for piece in parcel.pieces for row in rows_of(piece)}


def check_rows(spec: PatternSpec, source: range, target: range, parcel: Parcel | None) -> None:
    """What the parcel carries against the definition."""
    rows = Counter(row for p in (parcel.pieces if parcel else ()) for row in rows_of(p))
    needed = needed_rows(spec, (source.start, source.stop), (target.start, target.stop))
    assert rows.keys() == needed
    if is_nested(spec):
        assert all(count == 1 for count in rows.values())
    if parcel is not None:
        assert parcel.span[0] >= source.start and parcel.span[1] <= source.stop
        for i, piece in enumerate(parcel.pieces):
            later = {row for p in parcel.pieces[i + 1 :] for row in rows_of(p)}
            assert parcel.repeated[i] or not later & set(rows_of(piece))
            # no more than one unused slot for a head, and none without a row
            for head in range(piece.heads):
                count = sum(row[1] == piece.first_head + head for row in rows_of(piece))
                assert count > 0 and piece.slots - 1 <= count <= piece.slots


@pytest.mark.parametrize("seed", range(150))
def test_every_needed_row_travels_and_no_other(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([1, 2, 3, 4, 5, 8])
    seq_len = generator.randint(1, 90)
    spec = as_a_batch(generator, random_spec(generator, seq_len))
    lengths = random_shards(generator, seq_len, size)
    spans = [range(*span) for span in shards(lengths)]
    everything = plans(spec, lengths, "ring")
    for rank, plan in enumerate(everything):
        mine, theirs = sent(plan), received(plan)
        assert plan.queries == (spans[rank].start, spans[rank].stop)
        assert rank not in mine and rank not in theirs
        for peer in range(size):
            if peer != rank:
                check_rows(spec, spans[rank], spans[peer], mine.get(peer))
                back = received(everything[peer]).get(rank)
                assert (back is None) == (peer not in mine)
                if back is not None:
                    assert back.pieces == mine[peer].pieces
    gathered = plans(spec, lengths, "gather")
    for plan, one in zip(everything, gathered, strict=True):
        for ours, theirs in ((sent(plan), sent(one)), (received(plan), received(one))):
            assert {peer: all_rows(p) for peer, p in ours.items()} == {
                peer: all_rows(p) for peer, p in theirs.items()
            }
        for piece in (piece for parcel in sent(one).values() for piece in parcel.pieces):
            assert any(holds(half, piece) for half in halves(one.queries))
        assert len(plan.rounds) == size - 1 and len(one.rounds) == 1
        assert plan.is_alone == one.is_alone == (not sent(plan) and not received(plan))
        for block in (block for r in one.rounds for block in r.blocks):
            sides = pairs_of(block.keys)
            assert all(end <= plan.queries[0] or begin >= plan.queries[1] for begin, end in sides)
            for piece in (piece for m in block.parcels for piece in m.pieces):
                assert any(begin <= piece.begin and piece.end <= end for begin, end in sides)


@pytest.mark.parametrize("seed", range(150))
def test_zigzag_sends_what_is_needed_once(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([1, 2, 3, 4, 8])
    seq_len = generator.randint(1, 90)
    spec = as_a_batch(generator, random_spec(generator, seq_len))
    lengths = random_shards(generator, seq_len, 2 * size)
    held = shards(lengths, "zigzag")
    for strategy in ("ring", "gather"):
        everything = [make_plan(spec, lengths, rank, strategy, "zigzag") for rank in range(size)]
        for rank, plan in enumerate(everything):
            assert plan.queries == held[rank]
            for block in (block for r in plan.rounds for block in r.blocks):
                for piece in (piece for parcel in block.parcels for piece in parcel.pieces):
                    place_origin(block.keys, piece)  # raises if in none of the stretches
            for peer, parcel in received(plan).items():
                assert parcel.pieces == sent(everything[peer])[rank].pieces
                rows = Counter(row for piece in parcel.pieces for row in rows_of(piece))
                needed = set().union(
                    *(
                        needed_rows(spec, source, target)
                        for source in pairs_of(held[peer])
                        for target in pairs_of(held[rank])
                    )
                )
                assert rows.keys() == needed
                assert not is_nested(spec) or set(rows.values()) <= {1}
            others = set(range(size)) - {rank, *received(plan)}
            for peer in others:
                for source in pairs_of(held[peer]):
                    for target in pairs_of(held[rank]):
                        assert not needed_rows(spec, source, target)


def test_zigzag_balances_causal_work() -> None:
    """Of the pairs that ranks compute, contiguous and zigzag, in a segment of the whole."""
    spec = PatternSpec(640, make_branches([640], [1]), "interleaved", 1, 1, True)
    most = {}
    for layout, lengths in (("contiguous", (160,) * 4), ("zigzag", (80,) * 8)):
        pairs = [
            Pattern.plan(spec._replace(queries=queries)).report()["distinct"]
            for queries in shards(lengths, layout)
        ]
        assert sum(pairs) == 640 * 641 // 2
        most[layout] = max(pairs) / (sum(pairs) / 4)
    assert most["zigzag"] == 1.0 and most["contiguous"] > 1.7


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("seed", range(3))
def test_many_ranks(size: int, seed: int) -> None:
    generator = random.Random(1000 + seed)
    seq_len = size * 5 - seed
    spec = random_spec(generator, seq_len)
    lengths = random_shards(generator, seq_len, size)
    spans = [range(*span) for span in shards(lengths)]
    everything = plans(spec, lengths, "ring")
    for rank, plan in enumerate(everything):
        assert plan.rows_sent == sum(m.rows for m in sent(plan).values())
        for peer, parcel in sent(plan).items():
            assert received(everything[peer])[rank].pieces == parcel.pieces
    for rank in generator.sample(range(size), 4):
        for peer in range(size):
            if peer != rank:
                parcel = received(everything[rank]).get(peer)
                check_rows(spec, spans[peer], spans[rank], parcel)


@pytest.mark.parametrize("size", range(2, 18))
def test_a_step_pairs_every_rank_with_one_peer_each_way(size: int) -> None:
    for rank in range(size):
        met = [peers(rank, step, size) for step in range(1, size)]
        everyone = set(range(size)) - {rank}
        assert {to for to, _ in met} == {source for _, source in met} == everyone
    for step in range(1, size):
        for rank in range(size):
            to, source = peers(rank, step, size)
            assert peers(to, step, size)[1] == rank and peers(source, step, size)[0] == rank


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_travels_for_segments_inside_shards(is_causal: bool) -> None:
    for size in (1, 2, 8, 64):
        spec = PatternSpec(
            size * 64, make_branches([16, 32, 64], [1, 2, 4]), "interleaved", 8, 8, is_causal
        )
        for plan in plans(spec, (64,) * size, "ring"):
            assert plan.is_alone


@pytest.mark.parametrize("size", [2, 4, 8, 64])
@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_single_branch_has_the_closed_form(size: int, rate: int) -> None:
    """Rows of K sent and received per rank: (m - 1) / r of the shard, in m - 1 rounds."""
    n, heads = 64, 8
    m = size
    while m >= 2:
        branch = make_branches([m * n], [rate])
        spec = PatternSpec(size * n, branch, "interleaved", heads, heads)
        causal = PatternSpec(size * n, branch, "interleaved", heads, heads, True)
        total = 0
        for rank in range(size):
            plan = make_plan(spec, (n,) * size, rank, "ring")
            assert plan.rows_sent == plan.rows_received == (m - 1) * n * heads // rate
            assert [bool(r.sends) for r in plan.rounds] == [step < m for step in range(1, size)]
            half = make_plan(causal, (n,) * size, rank, "ring")
            assert half.rows_received == rank % m * n * heads // rate
            assert half.rows_sent == (m - 1 - rank % m) * n * heads // rate
            total += half.rows_sent
        assert total == size * (m - 1) * n * heads // rate // 2
        m //= 2


@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize("size", [2, 4, 8, 64])
def test_fused_branches_stay_below_the_sum(size: int, offsets: str) -> None:
    """LongNet's geometric branches, w = n, 2n, .., N with r = 1, 2, ..: sum of (m - 1) / r."""
    n, heads = 64, 64
    factors = [2**i for i in range(size.bit_length())]
    branches = make_branches([n * f for f in factors], factors)
    spec = PatternSpec(n * size, branches, offsets, heads, heads)
    bound = sum((f - 1) * n * heads // f for f in factors)
    for rank in {0, 1, size // 2, size - 1}:
        plan = make_plan(spec, (n,) * size, rank, "ring")
        assert 0 < plan.rows_sent == plan.rows_received <= bound
        single = [
            make_plan(
                PatternSpec(n * size, (branch,), offsets, heads, heads), (n,) * size, rank, "ring"
            ).rows_sent
            for branch in branches
        ]
        assert max(single) <= plan.rows_sent <= sum(single) == bound
        if size > 2 and offsets == "interleaved":
            assert plan.rows_sent < bound  # nested lattices travel once


def test_grouped_heads_need_the_union_of_their_offsets() -> None:
    branch = make_branches([128], [4])
    rows = {}
    for kv_heads in (8, 4, 2, 1):
        spec = PatternSpec(128, branch, "interleaved", 8, kv_heads)
        rows[kv_heads] = make_plan(spec, (64, 64), 0, "ring").rows_sent
    # KV heads times distinct offsets of their groups, of 16 rows each
    assert rows == {8: 8 * 16, 4: 4 * 2 * 16, 2: 2 * 4 * 16, 1: 4 * 16}


def test_plans_are_values_and_cached() -> None:
    spec = PatternSpec(96, make_branches([96], [2]), "interleaved", 4, 2)
    plan = make_plan(spec, (32, 64), 0, "ring")
    assert make_plan(spec, (32, 64), 0, "ring") is plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    hash(plan)


def test_batches_are_stretches_of_each_rank() -> None:
    assert shards((3, 2, 3, 2), size=2) == ((0, 3, 5, 8), (3, 5, 8, 10))
    assert shards((1, 2, 3, 4) * 2, "zigzag", 2) == (
        (0, 1, 6, 10, 10, 11, 16, 20),
        (1, 3, 3, 6, 11, 13, 13, 16),
    )
