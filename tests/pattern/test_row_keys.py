"""The keys of one query, against the definition over all pairs."""

from __future__ import annotations

import torch

from dilated_attention_pytorch.pattern import make_branches
from dilated_attention_pytorch.pattern.row_keys import row_keys
from tests.reference import multiplicities, zero_key_counts


def test_every_row() -> None:
    lengths, rates, seq_len = [16, 33, 100, 7], [1, 2, 6, 9], 61
    table = torch.tensor([[0, 0], [1, -1], [5, 2], [8, 3]])
    branches = make_branches(lengths, rates)
    zeros = zero_key_counts(seq_len, lengths, rates, table)
    for is_causal in (False, True):
        counts = multiplicities(seq_len, lengths, rates, table, is_causal)
        for head in range(2):
            for position in range(seq_len):
                options = {"is_causal": is_causal, "padding": "zeros"}
                offsets = table[:, head].tolist()
                held = row_keys(seq_len, branches, offsets, position, **options)
                row = counts[head, position]
                assert held.positions.tolist() == row.nonzero().flatten().tolist()
                assert torch.equal(held.counts, row[held.positions])
                assert held.zero_keys == (0 if is_causal else zeros[head, position])
