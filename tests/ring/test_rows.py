"""From a whole sequence to ranks' rows and back, in either layout."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.ring import shard, shard_positions, unshard
from dilated_attention_pytorch.ring.plans.layout import ShardLayout
from tests.ring.processes import Processes, group_of

LAYOUTS: list[tuple[ShardLayout, list[int] | None]] = [
    ("contiguous", None),
    ("contiguous", [5, 0, 19]),
    ("zigzag", None),
    ("zigzag", [5, 0, 3, 9, 1, 6]),
]
EQUAL = {
    "contiguous": [list(range(8)), list(range(8, 16)), list(range(16, 24))],
    "zigzag": [
        [*range(4), *range(20, 24)],
        [*range(4, 8), *range(16, 20)],
        [*range(8, 16)],
    ],
}


def there_and_back(size: int, layout: ShardLayout, lengths: list[int] | None) -> list[int]:
    group = group_of(size)
    whole = torch.arange(2 * 24 * 3, dtype=torch.float32).view(2, 24, 3)
    own = shard(whole, group, shard_lengths=lengths, shard_layout=layout)
    positions = shard_positions(24, group, shard_lengths=lengths, shard_layout=layout)
    assert torch.equal(own, whole[:, positions])
    back = unshard(own, group, shard_lengths=lengths, shard_layout=layout)
    assert torch.equal(back, whole)
    return positions.tolist()


@pytest.mark.parametrize("layout, lengths", LAYOUTS)
def test_there_and_back(workers: Processes, layout: ShardLayout, lengths: list[int] | None) -> None:
    found = workers.run(3, there_and_back, layout, lengths)
    assert sorted(sum(found, [])) == list(range(24))
    if lengths is None:
        assert found == EQUAL[layout]


def refusals(size: int) -> None:
    group = group_of(size)
    x = torch.zeros(1, 25, 2)
    with pytest.raises(ValueError, match="shard_lengths: must be given .* got 25 positions"):
        shard(x, group)
    with pytest.raises(ValueError, match="shard_lengths: must add up to .* 25 positions"):
        shard(x, group, shard_lengths=[8, 8, 8])
    with pytest.raises(ValueError, match="shard_lengths: must be 2 lengths for each"):
        shard_positions(24, group, shard_lengths=[8, 8, 8], shard_layout="zigzag")
    with pytest.raises(ValueError, match="shard_layout must be one of .* got 'striped'"):
        shard(x, group, shard_layout="striped")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: must have this rank's"):
        unshard(x, group, shard_lengths=[8, 8, 8])


def test_refuses(workers: Processes) -> None:
    workers.run(3, refusals)
