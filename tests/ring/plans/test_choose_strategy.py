"""The choice that "auto" makes, and the bytes it makes it from."""

from __future__ import annotations

import pytest

from dilated_attention_pytorch.pattern import PatternSpec, make_branches
from dilated_attention_pytorch.ring.plans.choose_strategy import (
    Sizes,
    check_strategy,
    choose_strategy,
    heads_moved,
    keys_moved,
)
from dilated_attention_pytorch.ring.plans.layout import shards
from dilated_attention_pytorch.ring.plans.plan import make_plan

SIZES = Sizes(row=128, element=2, wide=4)


def one_branch(
    size: int, members: int, rate: int = 1, kv_heads: int = 64, n: int = 64
) -> PatternSpec:
    branches = make_branches([members * n], [rate])
    return PatternSpec(size * n, branches, "interleaved", 64, kv_heads)


@pytest.mark.parametrize("size", [2, 4, 8, 64])
@pytest.mark.parametrize("rate", [1, 2, 4, 8])
def test_bytes_have_the_closed_forms(size: int, rate: int) -> None:
    """In units of L, the bytes of a rank's keys and values."""
    n, heads = 64, 64
    unit = 2 * n * heads * SIZES.row * SIZES.element
    m = size
    while m >= 2:
        spec = one_branch(size, m, rate)
        spans = shards((n,) * size)
        for rank in (0, size - 1):
            # forward F, backward F + 2 F as gradients are float32
            assert keys_moved(spec, spans[rank], SIZES) == 4 * (m - 1) / rate * unit
            # forward q k v out: 2; backward q k v and out's gradient 2, float32 gradients 3
            swapped = heads_moved(spec, spans, SIZES)[rank]
            assert swapped == pytest.approx((2 + 2 + 3) * (m - 1) / (m * rate) * unit)
        m //= 2


def test_bytes_bound_the_plan() -> None:
    branches = make_branches([1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16])
    spec = PatternSpec(2**20, branches, "interleaved", 16, 16)
    for size in (2, 4, 8, 64):
        lengths = (2**20 // size,) * size
        for rank in (0, size // 2, size - 1):
            moved = keys_moved(spec, shards(lengths)[rank], Sizes(row=1, element=1, wide=0))
            received = 2 * 2 * make_plan(spec, lengths, rank, "ring").rows_received
            # a slot for each head and piece at most beyond the share of 1 / rate
            assert received <= moved + 4 * 16 * 5 * size


@pytest.mark.parametrize(
    ("size", "members", "kv_heads", "expected"),
    [
        (2, 1, 64, "gather"),  # nothing travels
        (2, 2, 64, "gather"),
        (4, 4, 64, "all_to_all"),
        (64, 64, 64, "all_to_all"),
        (64, 2, 64, "gather"),
        (8, 8, 8, "gather"),  # grouped heads: keys are few, queries are not
        (64, 64, 32, "ring"),  # half of the ranks would have no head; all rows are far ones
    ],
)
def test_choice_by_bytes(size: int, members: int, kv_heads: int, expected: str) -> None:
    spec = one_branch(size, members, kv_heads=kv_heads)
    assert choose_strategy(spec, (64,) * size, SIZES) == expected


def test_dropout_excludes_all_to_all_and_memory_excludes_gather() -> None:
    small = one_branch(8, 8)
    assert choose_strategy(small, (64,) * 8, SIZES, has_dropout=True) == "gather"
    large = one_branch(8, 8, n=65536)
    assert choose_strategy(large, (65536,) * 8, SIZES, has_dropout=True) == "ring"
    sparse = one_branch(2, 2, rate=4, n=65536)
    assert choose_strategy(sparse, (65536,) * 2, SIZES) == "gather"
    # Where every row meets keys of the other rank, nothing is left to compute meanwhile.
    assert choose_strategy(one_branch(2, 2, n=65536), (65536,) * 2, SIZES) == "ring"


@pytest.mark.parametrize("size", [2, 4, 8])
def test_zigzag_is_never_divided_by_heads(size: int) -> None:
    dense, sparse = (one_branch(size, size, rate, n=65536) for rate in (1, 8))
    stretches = (32768,) * (2 * size)
    assert choose_strategy(dense, stretches, SIZES, layout="zigzag") == "ring"
    assert choose_strategy(sparse, stretches, SIZES, layout="zigzag") in ("gather", "ring")
    short = one_branch(size, 1, n=32768)
    assert choose_strategy(short, (32768,) * (2 * size), SIZES, layout="zigzag") == "gather"


def test_shards_may_be_empty() -> None:
    spec = one_branch(4, 4)
    assert choose_strategy(spec, (0, 256, 0, 0), SIZES) == "gather"
    assert choose_strategy(PatternSpec(0, spec.branches, "interleaved", 64, 64), (0, 0), SIZES)
    assert choose_strategy(spec, (256,), SIZES) == "gather"


def test_unknown_strategy_is_refused() -> None:
    assert check_strategy("ring") == "ring"
    with pytest.raises(ValueError, match="strategy must be one of .*, got 'rign'"):
        check_strategy("rign")
