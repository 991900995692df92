"""The planner against brute force: thousands of small random patterns, every pair of every head
counted.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from dilated_attention_pytorch import _C
from tests.planning import Plan, Spec, Stretches, Table, plan, plan_words

PATTERNS_PER_SEED = 250


def random_spec(rng: random.Random, longest: int = 70) -> Spec:
    seq_len = rng.randint(0, longest) if rng.random() < 0.9 else rng.randint(0, 3)
    branches = rng.randint(1, 4)
    rates = [rng.choice([1, 1, 2, 3, 4, 5, 8, 13]) for _ in range(branches)]
    kv_heads = rng.randint(1, 3)
    heads = kv_heads * rng.randint(1, 3)
    tables = {
        "interleaved": [[h % r for h in range(heads)] for r in rates],
        "blocked": [[h // -(-heads // r) for h in range(heads)] for r in rates],
        "table": [[rng.randint(-1, r - 1) for _ in range(heads)] for r in rates],
    }

    def positions() -> Stretches:
        if rng.random() < 0.5:
            return ((0, -1),)
        cuts = sorted(rng.randint(0, seq_len) for _ in range(2 * rng.choice([0, 1, 1, 2, 3])))
        return tuple(zip(cuts[::2], cuts[1::2], strict=True)) or ((0, 0),)

    return Spec(
        seq_len,
        [rng.randint(1, longest + 10) for _ in range(branches)],
        rates,
        heads,
        kv_heads,
        rng.choice(list(tables.values())),
        is_causal=rng.random() < 0.5,
        zero_padding=rng.random() < 0.5,
        queries=positions(),
        keys=positions(),
        row_tile=rng.choice([1, 3, 8, 64, None]),
    )


def count_pairs(spec: Spec) -> np.ndarray:
    """int64 [heads, seq_len, seq_len]: how many branches hold each pair; no causal mask, of all
    positions.
    """
    n = spec.seq_len
    counts = np.zeros((spec.heads, n, n), dtype=np.int64)
    p = np.arange(n)
    branches = zip(spec.segment_lengths, spec.dilation_rates, spec.offset_table, strict=True)
    for w, r, offsets in branches:
        w = min(w, max(n, 1))
        on = ((p % w) % r)[None] == np.array(offsets)[:, None]
        counts += on[:, :, None] & on[:, None, :] & (p[:, None] // w == p[None] // w)
    return counts


def count_zero_keys(spec: Spec) -> np.ndarray:
    """int64 [heads, seq_len]: slots of each row's segments that the sequence doesn't fill."""
    n = spec.seq_len
    counts = np.zeros((spec.heads, n), dtype=np.int64)
    p = np.arange(n)
    branches = zip(spec.segment_lengths, spec.dilation_rates, spec.offset_table, strict=True)
    for w, r, offsets in branches:
        w = min(w, max(n, 1))
        on = ((p % w) % r)[None] == np.array(offsets)[:, None]
        same = on[:, None, :] & (p[:, None] // w == p[None] // w)
        counts += np.where(on, -(-w // r) - same.sum(-1), 0)
    return counts


def check_structure(plan: Plan, table: Table, heads: int, rows: np.ndarray) -> None:
    """Tables are well formed: sizes, alignment, heads partitioned, every row in one tile, tiles
    not too high.
    """
    n = table.numbers
    for name in (name for name in n if name.endswith("_at")):
        assert n[name] % 4 == 0 and 0 < n[name] <= len(plan.words), name
    assert sorted(table.class_heads.tolist()) == list(range(heads))
    assert n["max_class_heads"] == np.diff(table.class_begin).max()

    tiles, groups = table.tiles, table.groups
    assert (tiles["rows"] > 0).all() and (tiles["rows"] <= table.numbers["row_tile"]).all()
    assert (table.runs["stride"] > 0).all() and (table.runs["count"] > 0).all()
    counts = np.append(0, np.cumsum(table.runs["count"].astype(np.int64)))
    for kind in ("row", "column"):
        begin = groups[f"{kind}_runs"]
        total = counts[begin + groups[f"{kind}_run_count"]] - counts[begin]
        assert (total == groups[f"{kind}s"]).all()

    head, row, _ = table.row_heads()
    assert np.array_equal(rows[table.row_places], table.rows[1])
    once = np.bincount(head * plan.header["seq_len"] + row, minlength=1)
    assert np.array_equal(
        np.flatnonzero(once),
        (np.arange(heads)[:, None] * plan.header["seq_len"] + rows).ravel(),
    )
    assert (once <= 1).all()

    # Tiles of a span lie where span_tiles says; every cell's and class's longest lists come first.
    assert table.span_tiles[0] == 0 and table.span_tiles[-1] == n["tiles"]
    assert (np.diff(table.span_tiles) >= 0).all()
    span = np.repeat(np.arange(n["spans"]), np.diff(table.span_tiles))
    order = np.zeros(len(span), dtype=np.int64)
    cells = np.stack([span, table.tile_class, tiles["origin"]])
    for key in np.unique(cells, axis=1).T:
        mine = (cells == key[:, None]).all(axis=0)
        assert (np.diff(groups["columns"][tiles["group"][mine]]) <= 0).all()
        order[mine] = np.cumsum(
            np.diff(tiles["group"][mine], prepend=tiles["group"][mine][:1]) != 0
        )
    # Class by class, or in the last span several classes together, the longest lists first.
    in_span = np.diff(span) == 0
    next_class = np.diff(table.tile_class) > 0
    assert next_class[in_span & (np.diff(order) < 0)].all()
    before_last = in_span & (span[1:] < n["spans"] - 1)
    assert (np.diff(table.tile_class)[before_last] >= 0).all()
    check_spans(table, span)


def check_spans(table: Table, tile_span: np.ndarray) -> None:
    """Positions of different spans don't interleave, and no tile has a column in another span's
    stretch.
    """
    row_tile, row = table.rows
    column_tile, column, _ = table.columns
    span = np.concatenate([tile_span[row_tile], tile_span[column_tile]])
    position = np.concatenate([row, column])
    spans = table.numbers["spans"]
    low, high = np.full(spans, np.iinfo(np.int64).max), np.full(spans, -1)
    np.minimum.at(low, span, position)
    np.maximum.at(high, span, position)
    assert (low[1:] > high[:-1]).all()


def check_pairs(table: Table, expected: np.ndarray, columns: np.ndarray) -> None:
    """expected: [row heads, column heads per row head, seq_len, seq_len], the multiplicity of every
    pair. columns: positions of the tensor's rows.
    """
    pairs = table.pairs()
    assert (pairs.multiplicity > 0).all()
    assert np.array_equal(columns[table.column_places], table.columns[1])
    assert (pairs.column_head < expected.shape[1]).all()
    at = (
        np.ravel_multi_index(
            (pairs.row_head, pairs.column_head, pairs.row, pairs.column), expected.shape
        )
        if len(pairs.row)
        else np.zeros(0, dtype=np.int64)
    )
    assert (np.bincount(at, minlength=1) <= 1).all(), "a pair is listed twice"
    listed = np.bincount(at, weights=pairs.multiplicity, minlength=expected.size)
    assert (listed.reshape(expected.shape) == expected).all()

    # A row that meets nothing is in a group without columns, and no other row is.
    head, row, tile = table.row_heads()
    empty = expected.sum((1, 3)) == 0
    column_less = table.groups["columns"][table.tiles["group"]] == 0
    assert (empty[head, row] == column_less[tile]).all()


def check_against_brute_force(spec: Spec) -> None:
    result = plan(spec)
    queries, keys = spec.positions(spec.queries), spec.positions(spec.keys)
    kv_heads = spec.heads if spec.kv_heads is None else spec.kv_heads
    group = spec.heads // kv_heads
    header = result.header
    assert header["magic"] == 0x44494C50 and header["words"] == len(result.words)
    assert (header["seq_len"], header["heads"], header["kv_heads"]) == (
        spec.seq_len,
        spec.heads,
        kv_heads,
    )
    assert (header["queries"], header["keys"]) == (len(queries), len(keys))
    assert header["is_causal"] == spec.is_causal

    counts = count_pairs(spec)
    counts[:, ~np.isin(np.arange(spec.seq_len), queries)] = 0
    counts[:, :, ~np.isin(np.arange(spec.seq_len), keys)] = 0
    check_structure(result, result.forward, spec.heads, queries)
    check_pairs(result.forward, counts[:, None], keys)

    by_kv_head = counts.reshape(kv_heads, group, *counts.shape[1:]).transpose(0, 1, 3, 2)
    check_structure(result, result.transposed, kv_heads, keys)
    check_pairs(result.transposed, by_kv_head, queries)

    # Zero keys belong to the shard of keys that holds the row itself, so a ring counts them once.
    zeros = np.zeros((spec.heads, spec.seq_len), dtype=np.int64)
    if spec.zero_padding and not spec.is_causal:
        zeros[:, keys] = count_zero_keys(spec)[:, keys]
    head, row, tile = result.forward.row_heads()
    listed = result.forward.groups["zero_keys"][result.forward.tiles["group"]]
    assert (listed[tile] == zeros[head, row]).all()

    check_report(spec, result, counts)


def check_report(spec: Spec, result: Plan, counts: np.ndarray) -> None:
    if spec.is_causal:
        counts = counts * np.tri(spec.seq_len, dtype=np.int64)
    numbers = _C.report(spec.native())
    assert numbers["nominal"] == counts.sum()
    assert numbers["distinct"] == (counts > 0).sum()
    assert numbers["computed"] >= numbers["distinct"]
    assert numbers["bytes"] == result.words.nbytes
    for name in ("tiles", "groups", "runs"):
        assert numbers[name] == result.forward.numbers[name]


def explain(spec: Spec) -> None:
    try:
        check_against_brute_force(spec)
    except AssertionError as error:
        raise AssertionError(f"{spec}: {error}") from error


@pytest.mark.parametrize("seed", range(12))
def test_small_random_patterns_list_every_pair_once(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(PATTERNS_PER_SEED):
        explain(random_spec(rng))


def test_longer_random_patterns_list_every_pair_once() -> None:
    # Long enough for lattices that repeat many times in a cell, and for several tiles in a group.
    rng = random.Random(1000)
    for _ in range(40):
        explain(random_spec(rng, longest=400))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
def test_nested_geometric_branches(offsets: str, is_causal: bool) -> None:
    rates = [1, 2, 4, 8]
    table = None
    if offsets == "blocked":
        table = [[h // -(-8 // r) for h in range(8)] for r in rates]
    explain(Spec(512, [32, 64, 128, 256], rates, 8, 2, table, is_causal=is_causal))


def test_nothing_is_wasted_when_everything_divides() -> None:
    numbers = _C.report(Spec(1024, [256, 1024], [1, 4], heads=4).native())
    assert numbers["computed"] == numbers["distinct"] < numbers["nominal"]


def test_tables_on_demand_are_those_of_both() -> None:
    rng = random.Random(11)
    for _ in range(100):
        spec = random_spec(rng)
        both = plan(spec)
        is_one = both.header_table(0) == both.header_table(1)
        for wanted, other in ((0, 1), (1, 0)):
            name = ("forward", "transposed")[wanted]
            part = plan(dataclasses.replace(spec, directions=name))
            assert np.array_equal(part.words[2:4], both.words[2:4])  # of one fingerprint
            assert set(part.header_table(other).values()) == {0} or is_one
            for field in ("class_begin", "class_heads", "span_tiles", "runs"):
                expected = getattr(getattr(both, name), field)
                assert np.array_equal(getattr(getattr(part, name), field), expected)
            for field in ("tiles", "groups"):
                pairs = zip(
                    getattr(getattr(part, name), field).values(),
                    getattr(getattr(both, name), field).values(),
                    strict=True,
                )
                assert all(np.array_equal(mine, expected) for mine, expected in pairs)


def test_planning_twice_gives_equal_words() -> None:
    rng = random.Random(7)
    for _ in range(100):
        spec = random_spec(rng)
        assert np.array_equal(plan_words(spec), plan_words(spec))


def test_segments_longer_than_the_sequence_are_clipped() -> None:
    clipped = Spec(100, [30, 100], [1, 3], 4)
    assert np.array_equal(
        plan_words(clipped),
        plan_words(dataclasses.replace(clipped, segment_lengths=[30, 10**12])),
    )


def test_fingerprint_depends_on_every_field() -> None:
    base = Spec(96, [16, 48], [1, 2], 4, 2, [[0, 0, 0, 0], [0, 1, 0, 1]])
    others = [
        {"seq_len": 95},
        {"segment_lengths": [24, 48]},
        {"dilation_rates": [2, 2]},
        {"heads": 8, "kv_heads": 2, "offsets": [[0] * 8, [0, 1] * 4]},
        {"kv_heads": 4},
        {"offsets": [[0, 0, 0, 0], [0, 1, 0, -1]]},
        {"is_causal": True},
        {"zero_padding": True},
        {"queries": ((0, 48),)},
        {"keys": ((48, 96),)},
        {"keys": ((0, 24), (48, 96))},
    ]
    specs = [base, *(dataclasses.replace(base, **change) for change in others)]
    prints = {tuple(plan_words(spec)[2:4].tolist()) for spec in specs}
    assert len(prints) == len(specs)


def test_empty_and_adjacent_stretches_are_what_they_hold() -> None:
    parts = ((0, 0), (5, 9), *((9, 9),) * 300, *((p, p + 1) for p in range(9, 300)), (320, 320))
    for name in ("queries", "keys"):
        one, many = (
            Spec(320, [40, 320], [1, 4], 4, 2, **{name: stretches})  # type: ignore[arg-type]
            for stretches in (((5, 300),), parts)
        )
        assert bytes(_C.plan(one.native())) == bytes(_C.plan(many.native()))
    none, nowhere = (Spec(320, [40], [1], keys=keys) for keys in ((), ((28, 28),)))
    assert bytes(_C.plan(none.native())) == bytes(_C.plan(nowhere.native()))


def test_a_segment_meets_at_most_256_stretches() -> None:
    parts = tuple((2 * p, 2 * p + 1) for p in range(257))
    check_against_brute_force(Spec(600, [600], [1], keys=parts[:-1], is_causal=True))
    with pytest.raises(ValueError, match="at most 256 stretches in a row's segments, got 257"):
        plan_words(Spec(600, [600], [1], keys=parts))


@pytest.mark.parametrize("heads", [1, 6, 12, 16])
def test_named_offsets(heads: int) -> None:
    for rate in (1, 2, 4, 6, 12, 16):
        assert _C.interleaved_offsets(rate, heads) == [h % rate for h in range(heads)]
        assert _C.blocked_offsets(rate, heads) == [h // -(-heads // rate) for h in range(heads)]


def test_a_branch_without_offsets_has_the_interleaved_ones() -> None:
    given, left_out = (Spec(96, [16, 48], [3, 2], 4).native() for _ in range(2))
    left_out.branches = [_C.Branch(16, 3), _C.Branch(48, 2)]
    assert bytes(_C.plan(given)) == bytes(_C.plan(left_out))


GEOMETRIC = [1, 2, 4, 8, 16]
GIGAPATH = [1024, 5792, 32768, 185363, 1048576]
# segment lengths, rates, N, heads, offsets; nominal / distinct; computed / distinct with 64-row
# tiles (research tables of exact counts; the paper's branches with its 12 heads, the others with
# GigaPath's 16).
WASTE = [
    ([2048, 4096, 8192, 16384, 32768], GEOMETRIC, 32768, 16, "blocked", 1.25, 1.00),
    ([2048, 4096, 8192, 16384, 32768], GEOMETRIC, 32768, 16, "interleaved", 1.32, 1.00),
    ([1024, 2048, 4096, 8192, 16384], GEOMETRIC, 16384, 16, "blocked", 1.25, 1.00),
    ([1024, 2048, 4096, 8192, 16384], GEOMETRIC, 16384, 16, "interleaved", 1.32, 1.01),
    (GIGAPATH, GEOMETRIC, 10001, 16, "blocked", 1.20, 1.08),
    (GIGAPATH, GEOMETRIC, 10001, 16, "interleaved", 1.32, 1.10),
    (GIGAPATH, GEOMETRIC, 65001, 16, "blocked", 1.13, 1.08),
    (GIGAPATH, GEOMETRIC, 65001, 16, "interleaved", 1.31, 1.12),
    ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12], 32768, 12, "blocked", 1.25, 1.09),
    ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12], 32768, 12, "interleaved", 1.30, 1.10),
    ([512, 1024], [1, 2], 16384, 8, "blocked", 1.20, 1.00),
    ([512, 1024], [1, 2], 16384, 8, "interleaved", 1.20, 1.00),
]


@pytest.mark.parametrize(
    ("lengths", "rates", "seq_len", "heads", "offsets", "shared", "waste"), WASTE
)
def test_tiles_waste_no_more_than_promised(
    lengths: list[int],
    rates: list[int],
    seq_len: int,
    heads: int,
    offsets: str,
    shared: float,
    waste: float,
) -> None:
    table = None
    if offsets == "blocked":
        table = [[h // -(-heads // r) for h in range(heads)] for r in rates]
    numbers = _C.report(Spec(seq_len, lengths, rates, heads, None, table).native())
    assert numbers["nominal"] / numbers["distinct"] == pytest.approx(shared, abs=0.0051)
    assert numbers["computed"] / numbers["distinct"] <= waste * 1.01


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seq_len": -1}, "seq_len"),
        ({"segment_lengths": [], "dilation_rates": [], "offsets": []}, "segment_lengths"),
        ({"segment_lengths": [0, 8]}, "segment_lengths"),
        ({"dilation_rates": [1, 0]}, "dilation_rates"),
        ({"heads": 0, "offsets": [[], []]}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"offsets": [[0, 0, 0, 0], [0, 1, 2, 0]]}, "head_offsets"),
        ({"offsets": [[0, 0, 0, 0], [0, 1, -2, 0]]}, "head_offsets"),
        ({"offsets": [[0, 0, 0, 0], [0, 1, 0]]}, "head_offsets"),
        ({"queries": ((8, 4),)}, "queries"),
        ({"queries": ((0, 9), (8, 12))}, "queries: must be in the sequence's order"),
        ({"keys": ((9, 12), (0, 8))}, "keys: must be in the sequence's order"),
        ({"keys": ((0, 33),)}, "keys"),
        ({"row_tile": 0}, "row_tile"),
    ],
)
def test_bad_specifications_are_refused_by_name(change: dict[str, object], named: str) -> None:
    good = Spec(32, [8, 16], [1, 2], 4, offsets=[[0] * 4, [0, 1, 0, 1]])
    plan_words(good)
    with pytest.raises(ValueError, match=named):
        plan_words(dataclasses.replace(good, **change))  # type: ignore[arg-type]


def test_the_longest_sequence_is_counted_without_overflow() -> None:
    n = 2**31 - 2
    spec = Spec(n, [n, n], [1, 4], offsets=[[0], [1]], queries=((n - 1, n),), directions="forward")
    table = plan(spec).forward
    assert table.groups["columns"].tolist() == [n]
    assert sorted(table.runs["count"].tolist()) == sorted([1, n // 2, n // 4 + 1, n // 4])
    whole = Spec(n, [n], [1], row_tile=4096)
    assert plan(whole).forward.numbers["tiles"] == -(-n // 4096)
