"""The density of pairs against the dense reference, pair by pair and in cells."""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch.pattern import make_branches
from dilated_attention_pytorch.pattern.density import pair_density
from tests.reference import multiplicities

LENGTHS, RATES = [8, 20, 64], [1, 3, 4]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offsets", [(0, 2, 1), (0, -1, 3), (-1, -1, -1)])
@pytest.mark.parametrize("seq_len", [1, 45, 64])
def test_it_is_the_mean_of_the_pairs(
    seq_len: int, offsets: tuple[int, ...], is_causal: bool
) -> None:
    table = torch.tensor(offsets)[:, None]
    exact = multiplicities(seq_len, LENGTHS, RATES, table, is_causal)[0].double()
    branches = make_branches(LENGTHS, RATES)
    torch.testing.assert_close(
        pair_density(seq_len, branches, offsets, is_causal, seq_len), exact, rtol=0, atol=1e-12
    )
    for cells in {1, 7, 10} & set(range(seq_len)):
        edges = [-(-seq_len * i // cells) for i in range(cells + 1)]
        stretches = list(zip(edges, edges[1:], strict=False))
        means = [[exact[a:b, c:d].mean() for c, d in stretches] for a, b in stretches]
        found = pair_density(seq_len, branches, offsets, is_causal, cells)
        torch.testing.assert_close(found, torch.tensor(means), rtol=0, atol=1e-12)
