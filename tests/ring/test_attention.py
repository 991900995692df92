"""Every strategy over processes equals the operator on the whole sequence, with all gradients."""

from __future__ import annotations

import pytest

from tests.ring.processes import Processes
from tests.ring.sharded import Case, compare

STRATEGIES = ("ring", "gather", "all_to_all", "auto")
TABLE = ((0, -1, 0, 0), (1, 0, -1, -1), (-1, 2, 0, -1))


def check(workers: Processes, case: Case, strategies: tuple[str, ...] = STRATEGIES) -> None:
    size = len(case.shard_lengths)
    for rank, found in enumerate(workers.run(size, compare, case, strategies)):
        for strategy, errors in zip(strategies, found, strict=True):
            for name, error in errors.items():
                assert error < 1e-12, f"rank {rank}, {strategy}, {name}: {error:.1e}"


NAMED = {
    "aligned": Case((32, 32), (16, 32, 64), (1, 2, 4)),
    "aligned, four ranks": Case((16,) * 4, (16, 32, 64), (1, 2, 4)),
    "three ranks": Case((20, 20, 20), (10, 30, 60), (1, 2, 3)),
    "one rank": Case((40,), (8, 40), (1, 2)),
    "inside shards": Case((32, 32), (8, 16), (1, 2)),
    "unaligned": Case((23, 23), (7, 19, 40), (1, 3, 5)),
    "unequal shards": Case((5, 40, 11), (9, 30, 100), (1, 2, 4)),
    "empty shards": Case((0, 30, 0, 17), (9, 25, 47), (1, 2, 3)),
    "all rows on one rank": Case((0, 0, 33), (11, 33), (1, 2)),
    "nothing at all": Case((0, 0), (8,), (1,)),
    "one row a rank": Case((1, 1, 1, 1), (2, 4), (1, 2)),
    "long segments": Case((13, 29, 21), (10**9, 16), (3, 1)),
    "rates beyond segments": Case((20, 25), (4, 40), (8, 16)),
    "grouped heads": Case((24, 24), (16, 48), (1, 3), heads=8, kv_heads=2),
    "one KV head": Case((17, 20, 9), (12, 46), (2, 4), heads=6, kv_heads=1),
    "fewer KV heads than ranks": Case((16,) * 4, (64, 8), (4, 1), heads=4, kv_heads=2),
    "blocked offsets": Case(
        (20, 28), (12, 48), (2, 4), options={"head_offsets": ((0, 0, 1, 1), (0, 1, 2, 3))}
    ),
    "table with absent heads": Case(
        (20, 28), (12, 48, 30), (2, 2, 3), options={"head_offsets": TABLE}
    ),
    "a branch without heads": Case(
        (20, 28), (12, 48), (2, 3), options={"head_offsets": ((-1,) * 4, (1, 0, 2, -1))}
    ),
    "rows that no branch covers": Case(
        (20, 28), (12, 48), (3, 4), options={"head_offsets": ((2,) * 4, (3,) * 4)}
    ),
    "scale": Case((20, 20), (12, 40), (1, 2), options={"scale": 0.7}),
    "lattices that cross": Case((25, 25), (50, 50, 40), (2, 3, 4)),
    "odd head_dim": Case((15, 18), (12, 33), (1, 2), head_dim=5),
}


@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_equals_the_whole(workers: Processes, name: str, is_causal: bool, padding: str) -> None:
    case = NAMED[name]
    check(
        workers,
        Case(
            **{
                **vars(case),
                "options": {**case.options, "is_causal": is_causal, "padding": padding},
            }
        ),
    )
