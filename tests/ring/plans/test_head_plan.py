"""The plan of "all_to_all": every query of a branch is computed once, with all rows it needs."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from dilated_attention_pytorch.pattern import PatternSpec, make_branches
from dilated_attention_pytorch.ring.plans.head_plan import HeadPlan, make_head_plan
from dilated_attention_pytorch.ring.plans.layout import shards
from tests.ring.geometry import random_shards, random_spec, rows_of


def head_plans(spec: PatternSpec, lengths: tuple[int, ...]) -> list[HeadPlan]:
    return [make_head_plan(spec, lengths, rank) for rank in range(len(lengths))]


@pytest.mark.parametrize("seed", range(150))
def test_every_query_of_a_branch_is_computed_once_with_all_its_rows(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([1, 2, 3, 4, 8])
    seq_len = generator.randint(1, 80)
    spec = random_spec(generator, seq_len)
    lengths = random_shards(generator, seq_len, size)
    spans = shards(lengths)
    plans = head_plans(spec, lengths)
    (whole,) = {plan.whole for plan in plans}
    group = spec.heads // spec.kv_heads
    for index, (branch, offsets) in enumerate(zip(spec.branches, spec.offset_table(), strict=True)):
        w, r = min(branch.segment_length, seq_len), branch.dilation_rate
        if index in whole:
            ranks = {(p // w, i) for i, span in enumerate(spans) for p in range(*span)}
            assert len(ranks) == len({segment for segment, _ in ranks})
            continue
        computed: Counter[tuple[int, int]] = Counter()
        for plan in plans:
            for share in (s for s in plan.own if s.branch == index):
                assert share.query_heads == tuple(group * h for h in share.kv_heads)
                held = [part.rows for part in share.parts]
                assert sum(e - b for b, e in held) == share.rows[1] - share.rows[0]
                computed.update(
                    (p, h)
                    for p in range(*share.rows)
                    for h in range(*share.query_heads)
                    if p % w % r == offsets[h]
                )
        expected = {
            (p, h) for p in range(seq_len) for h in range(spec.heads) if p % w % r == offsets[h]
        }
        assert computed.keys() == expected
        assert all(count == 1 for count in computed.values())


@pytest.mark.parametrize("seed", range(100))
def test_messages_carry_the_rows_of_the_share(seed: int) -> None:
    generator = random.Random(seed)
    size = generator.choice([2, 3, 4])
    seq_len = generator.randint(1, 60)
    spec = random_spec(generator, seq_len)
    lengths = random_shards(generator, seq_len, size)
    plans = head_plans(spec, lengths)
    group = spec.heads // spec.kv_heads
    for plan in plans:
        assert plan.outgoing(plan.rank) == plan.incoming(plan.rank) == []
        for peer in range(size):
            mine, theirs = plan.outgoing(peer), plans[peer].incoming(plan.rank)
            assert [part for _, part in mine] == [part for _, part in theirs]
            assert [s.rows for s, _ in mine] == [s.rows for s, _ in theirs]
            for share, part in plan.outgoing(peer):
                branch = spec.branches[share.branch]
                w, r = min(branch.segment_length, seq_len), branch.dilation_rate
                offsets = spec.offset_table()[share.branch]
                queries = [row for piece in part.queries for row in rows_of(piece)]
                keys = [row for piece in part.keys for row in rows_of(piece)]
                expected = {
                    (p, h)
                    for p in range(*part.rows)
                    for h in range(*share.query_heads)
                    if p % w % r == offsets[h]
                }
                assert len(queries) == len(set(queries)) and set(queries) == expected
                assert len(keys) == len(set(keys))
                assert set(keys) == {(p, h // group) for p, h in expected}


@pytest.mark.parametrize("size", [2, 4, 8, 64])
@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_single_branch_has_the_closed_form(size: int, rate: int) -> None:
    """Rows of each of q, k, v and out sent per rank: (m - 1) / (m r) of the shard."""
    n, heads = 64, 64
    m = size
    while m >= 2:
        spec = PatternSpec(size * n, make_branches([m * n], [rate]), "interleaved", heads, heads)
        for rank in {0, size // 2, size - 1}:
            plan = make_head_plan(spec, (n,) * size, rank)
            everyone = range(size)
            parts = [part for peer in everyone for _, part in plan.outgoing(peer)]
            back = [part for peer in everyone for _, part in plan.incoming(peer)]
            expected = (m - 1) * n * heads // (m * rate)
            for kind in ("queries", "keys"):
                for some in (parts, back):
                    assert sum(p.rows for part in some for p in getattr(part, kind)) == expected
        m //= 2
