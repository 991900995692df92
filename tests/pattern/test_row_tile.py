"""Which tiles a pattern is cut into, by how full they are."""

from __future__ import annotations

import random

import pytest

from dilated_attention_pytorch import _C
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, Sequences, make_branches
from tests.pattern.test_plan import check_against_brute_force
from tests.planning import Plan, Spec, plan

SHORT = ([64, 128, 256, 512], [1, 2, 4, 8])
LONG = ([512, 1024], [1, 2])


def batch(lengths: list[int], branches: tuple[list[int], list[int]]) -> PatternSpec:
    rows = [(sum(lengths[:i]), n) for i, n in enumerate(lengths)]
    sequences = Sequences(rows)
    return PatternSpec(sum(lengths), make_branches(*branches), "blocked", 4, 4, sequences=sequences)


def row_tile(words: object) -> int:
    return plan_of(words).forward.numbers["row_tile"]


def plan_of(words: object) -> Plan:
    import numpy as np

    return Plan(np.asarray(words))


@pytest.mark.parametrize(("branches", "rows"), [(SHORT, 16), (LONG, 64)])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("directions", ["forward", "transposed", "both"])
def test_short_groups_are_cut_into_short_tiles(
    branches: tuple[list[int], list[int]], rows: int, kv_heads: int, directions: str
) -> None:
    spec = Spec(4096, *branches, 8, kv_heads, row_tile=None, directions=directions)
    words = plan(spec)
    heights = {table.numbers["row_tile"] for table in (words.forward, words.transposed)}
    assert heights - {0} == {rows}


@pytest.mark.parametrize("is_causal", [False, True])
def test_short_segments_waste_little(is_causal: bool) -> None:
    spec = PatternSpec(16384, make_branches(*SHORT), "blocked", 8, 8, is_causal)
    counts = {rows: _C.report(spec._replace(row_tile=rows).native()) for rows in (None, 16, 64)}
    waste = {rows: numbers["computed"] / numbers["distinct"] for rows, numbers in counts.items()}
    assert waste[None] == waste[16] <= (2.1 if is_causal else 1.4) < waste[64] / 3


@pytest.mark.parametrize(("least", "most", "height"), [(5, 60, 16), (20, 64, 64)])
def test_tiles_of_short_sequences_of_one_branch(least: int, most: int, height: int) -> None:
    rng = random.Random(0)
    spec = batch([rng.randint(least, most) for _ in range(1000)], ([64], [1]))
    assert row_tile(Pattern.plan(spec).words) == height


@pytest.mark.parametrize("row_tile", [None, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_listed_once(seed: int, row_tile: int | None) -> None:
    rng = random.Random(seed)
    lengths = sorted(rng.sample(range(3, 70), 3))
    rates = [rng.randint(1, 4) for _ in lengths]
    check_against_brute_force(Spec(150, lengths, rates, 4, 2, row_tile=row_tile))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([5, 9, 30, 12] * 8, 16), ([2048, 5, 2048], 64), ([2048] + [7] * 20000, 16)],
)
def test_a_batch_has_one_height_that_its_lengths_choose_together(
    lengths: list[int], rows: int
) -> None:
    spec = batch(lengths, LONG)
    pattern = Pattern.plan(spec)
    assert row_tile(pattern.words) == rows
    given = Pattern.plan(spec._replace(row_tile=rows))
    assert pattern.words.equal(given.words)  # however the parts were cut
    tiles = plan_of(pattern.words).forward.tiles
    assert tiles["rows"].sum() == plan_of(given.words).forward.tiles["rows"].sum()


def test_a_height_may_be_given() -> None:
    for rows in (16, 64):
        words = plan(Spec(512, *SHORT, row_tile=rows))
        assert words.forward.numbers["row_tile"] == rows


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("branches", "waste"), [(([4, 4096], [8, 2]), 3.0), (([8, 2048], [2, 1]), 2.6)]
)
def test_rows_of_several_cells_that_have_the_same_columns_share_tiles(
    branches: tuple[list[int], list[int]], waste: float, is_causal: bool
) -> None:
    spec = PatternSpec(16384, make_branches(*branches), "blocked", 8, 8, is_causal)
    counts = _C.report(spec.native())
    assert counts["computed"] / counts["distinct"] < waste


@pytest.mark.parametrize(
    "branches", [([4, 64], [8, 2]), ([3, 40], [2, 1]), ([4, 30, 64], [3, 2, 1])]
)
@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("queries", [(0, -1), (50, 151)])
def test_merged_rows_are_listed_once(
    branches: tuple[list[int], list[int]], zero_padding: bool, queries: tuple[int, int]
) -> None:
    for kv_heads in (4, 2):
        options = {"zero_padding": zero_padding, "queries": (queries,), "row_tile": None}
        check_against_brute_force(Spec(200, *branches, 4, kv_heads, **options))  # type: ignore[arg-type]
