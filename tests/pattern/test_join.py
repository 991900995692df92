"""Patterns of batches: each sequence has the tables of its length, moved to where it lies."""

from __future__ import annotations

import dataclasses
import itertools
import random
import struct

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import _C
from dilated_attention_pytorch.pattern import (
    Pattern,
    PatternSpec,
    Sequences,
    make_branches,
    max_pattern_bytes,
    set_max_pattern_bytes,
)
from tests.pattern.test_plan import random_spec
from tests.planning import Plan, Spec, Table, plan
from tests.reference import multiplicities

Places = list[tuple[int, int]]


def random_places(rng: random.Random) -> tuple[Places, int]:
    places, end = [], rng.choice([0, 4])
    for _ in range(rng.choice([0, 1, 2, 5, 9])):
        length = rng.choice([0, 1, 7, rng.randint(2, 60)])
        places.append((end, length))
        end += length + rng.choice([0, 0, 3])
    return places, end


def join(spec: Spec, places: Places, rows: int) -> Plan:
    """Of one call; spec is one of the sequences."""
    native = dataclasses.replace(spec, seq_len=rows).native()
    native.sequences = Sequences(places).numbers()
    return Plan(np.frombuffer(_C.plan(native), dtype=np.int32).copy())


def check_tiles(joined: Table, alone: Table, tiles: slice, first: int) -> None:
    """These tiles have the rows and columns of a table, `first` rows further on."""
    chosen = range(len(joined.tiles["group"]))[tiles]
    assert len(chosen) == len(alone.tiles["group"])
    names = ["origin", "first_row", "rows", "first_window"]
    for name in names:
        assert np.array_equal(joined.tiles[name][tiles], alone.tiles[name]), name
    assert np.array_equal(joined.tile_class[tiles], alone.tile_class)
    for ours, theirs, places in (
        (joined.rows, alone.rows, (joined.row_places, alone.row_places)),
        (joined.columns, alone.columns, (joined.column_places, alone.column_places)),
    ):
        mine = (ours[0] >= chosen.start) & (ours[0] < chosen.stop)
        assert np.array_equal(ours[0][mine] - chosen.start, theirs[0])
        assert np.array_equal(ours[1][mine], theirs[1])  # positions begin anew
        assert np.array_equal(places[0][mine], places[1] + first)
    runs = joined.columns[2][mine], alone.columns[2]
    assert np.array_equal(joined.runs[runs[0]], alone.runs[runs[1]])
    groups = joined.tiles["group"][tiles], alone.tiles["group"]
    for name in ("rows", "columns", "zero_keys"):
        assert np.array_equal(joined.groups[name][groups[0]], alone.groups[name][groups[1]])


@pytest.mark.parametrize("seed", range(8))
def test_sequences_have_the_tables_of_their_lengths(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(100):
        spec = dataclasses.replace(random_spec(rng), queries=((0, -1),), keys=((0, -1),))
        places, rows = random_places(rng)
        joined = join(spec, places, rows)
        assert joined.header["seq_len"] == joined.header["queries"] == rows
        order = sorted((-length, i) for i, (_, length) in enumerate(places) if length > 0)
        for index, table in enumerate((joined.forward, joined.transposed)):
            at, spans, height = 0, [0], table.numbers["row_tile"]  # one for all lengths
            for negative, i in order:  # the longest first
                one = plan(dataclasses.replace(spec, seq_len=-negative, row_tile=height))
                alone = (one.forward, one.transposed)[index]
                tiles = slice(at, at + len(alone.tiles["group"]))
                assert (table.tiles["sequence"][tiles] == i).all()
                check_tiles(table, alone, tiles, places[i][0])
                assert np.array_equal(table.class_heads, alone.class_heads)
                spans += [at + span for span in alone.span_tiles[1:].tolist()]
                at = tiles.stop
            assert len(table.tiles["group"]) == at and table.span_tiles.tolist() == spans


def batch(places: Places, rows: int, **fields: object) -> PatternSpec:
    spec = PatternSpec(rows, make_branches([8, 20], [1, 3]), "interleaved", 4, 2)
    return spec._replace(sequences=Sequences(places), **fields)


@pytest.mark.parametrize("directions", ["forward", "transposed", "both"])
def test_parts_that_were_planned_before_give_the_same(directions: str) -> None:
    spec = batch([(0, 30), (30, 0), (32, 7), (40, 30)], 75, directions=directions)
    assert [part.seq_len for part in spec.parts()] == [30, 7]
    parts = [Pattern.plan(part) for part in spec.parts()]
    assert Pattern.join(spec, parts).words.equal(Pattern.plan(spec).words)
    both = [Pattern.plan(part._replace(directions="both")) for part in spec.parts()]
    assert Pattern.join(spec, both).words.equal(Pattern.plan(spec).words)


def test_many_lengths_are_planned_at_once() -> None:
    fields = {"heads": 16, "kv_heads": 16, "head_offsets": "blocked"}
    spec = batch([(3000 * i, 3000 - 40 * i) for i in range(12)], 36_000, **fields)
    parts = spec.parts()
    for pattern, part in zip(Pattern.plan_parts(spec, parts), parts, strict=True):
        alone = Pattern.plan(part)
        assert pattern.spec == part and pattern.words.equal(alone.words)
        assert pattern.head_offsets is not None and alone.head_offsets is not None
        assert pattern.head_offsets.equal(alone.head_offsets)
    assert Pattern.plan_parts(spec, []) == []


def test_what_fails_on_one_thread_ends_all() -> None:
    fields = {"heads": 16, "kv_heads": 16}
    spec = batch([(3000 * i, 3000 - i) for i in range(30)], 90_000, **fields)
    before = max_pattern_bytes()
    one = Pattern.plan(spec.parts()[0]).nbytes
    try:
        for limit, named in ((one // 2, "dilation_rates"), (9 * one, "sequences")):
            set_max_pattern_bytes(limit)
            for attempt in (Pattern.plan, lambda x: Pattern.plan_parts(x, x.parts())):
                with pytest.raises(ValueError, match=f"{named}: must give a pattern of at most"):
                    attempt(spec)
    finally:
        set_max_pattern_bytes(before)


def test_groups_are_kept_once_a_length() -> None:
    alone = Pattern.plan(batch([(0, 30)], 30)).report()
    many = Pattern.plan(batch([(30 * i, 30) for i in range(50)], 1500)).report()
    assert many["groups"] == alone["groups"] and many["runs"] == alone["runs"]
    for name in ("tiles", "nominal", "distinct", "computed"):
        assert many[name] == 50 * alone[name]


@pytest.mark.parametrize("is_causal", [False, True])
def test_reports_count_what_sequences_hold(is_causal: bool) -> None:
    spec = batch([(0, 30), (31, 1), (40, 13)], 60, is_causal=is_causal)
    offsets = [list(row) for row in spec.offset_table()]
    lengths, rates = zip(*spec.branches, strict=True)
    counts = [
        multiplicities(n, lengths, rates, torch.tensor(offsets), is_causal) for n in (30, 1, 13)
    ]
    report = Pattern.plan(spec).report()
    assert report["nominal"] == sum(int(count.sum()) for count in counts)
    assert report["distinct"] == sum(int((count > 0).sum()) for count in counts)


def test_what_a_batch_may_take_is_bounded() -> None:
    spec = batch([(60 * i, 60) for i in range(500)], 30_000)
    before = max_pattern_bytes()
    try:
        set_max_pattern_bytes(Pattern.plan(spec).nbytes // 2)
        with pytest.raises(ValueError, match="sequences: must give a pattern of at most"):
            Pattern.plan(spec)
        Pattern.plan(spec.parts()[0])
    finally:
        set_max_pattern_bytes(before)


@pytest.mark.parametrize(
    ("places", "rule", "given"),
    [
        ([(0, 5), (4, 5)], "ascend and not overlap", "begins at 4 at index 1"),
        ([(5, 5), (0, 5)], "ascend and not overlap", "begins at 0 at index 1"),
        ([(-1, 5)], "ascend and not overlap", "begins at -1"),
        ([(0, -1)], "have lengths of at least 0", "-1 at index 0"),
        ([(0, 5), (5, 6)], "end within the 10 rows", "first row 5, length 6 at index 1"),
        ([(11, 0)], "end within the 10 rows", "first row 11, length 0"),
        ([(2**62, 2**62)], "end within the 10 rows", f"length {2**62}"),
        ([(3, 2**63 - 1)], "end within the 10 rows", f"length {2**63 - 1}"),
    ],
)
def test_places_are_checked(places: Places, rule: str, given: str) -> None:
    native = batch([], 10).native()
    native.sequences = struct.pack(f"{2 * len(places)}q", *itertools.chain(*places))
    assert native.sequences == places
    with pytest.raises(ValueError, match=rf"sequences: must {rule}.*{given}"):
        _C.plan(native)


def test_ranges_of_a_batch_are_not_joined() -> None:
    spec = batch([(0, 5)], 10, queries=(0, 5))
    assert spec.parts() == ()
    assert Pattern.plan(spec).report()["distinct"] > 0
    with pytest.raises(ValueError, match="sequences: must be joined where queries and keys are"):
        Pattern.join(spec, [Pattern.plan(batch([(0, 5)], 10).parts()[0])])


def test_parts_are_checked() -> None:
    spec = batch([(0, 30), (30, 7)], 40)
    long, short = (Pattern.plan(part) for part in spec.parts())
    forward = Pattern.plan(spec.parts()[1]._replace(directions="forward"))
    causal = Pattern.plan(spec.parts()[1]._replace(is_causal=True))
    for parts in ([short, long], [long, forward], [long, causal], [long, long]):
        with pytest.raises(ValueError, match="parts: must be the patterns of the batch's lengths"):
            Pattern.join(spec, parts)
    with pytest.raises(ValueError, match="parts: must be one for each of the batch's 2"):
        Pattern.join(spec, [long])
    short.words.numpy()[-1] ^= 1  # torch does not count this write
    with pytest.raises(ValueError, match="parts: must hold the words that plan"):
        Pattern.join(spec, [long, short])
