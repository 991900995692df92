"""The value that says where the sequences of a batch lie."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from dilated_attention_pytorch.pattern import Sequences

PLACES = [(0, 5), (5, 0), (9, 5), (14, 2)]


def test_lists_and_tables_are_equal() -> None:
    table = torch.tensor(PLACES)
    made = Sequences(PLACES), Sequences(table), Sequences(table.T.contiguous().T)
    for sequences in made:
        assert sequences == made[0] and hash(sequences) == hash(made[0])
        assert sequences.tensor.equal(table) and sequences.tensor.is_contiguous()
        assert len(sequences) == 4 and sequences.lengths() == [5, 2]
    assert Sequences(PLACES[:3]) != made[0] and made[0] != PLACES
    assert pickle.loads(pickle.dumps(made[0])) == made[0]
    assert repr(made[0]) == f"Sequences({PLACES})"


def test_the_table_is_a_copy() -> None:
    table = torch.tensor(PLACES)
    sequences = Sequences(table)
    table[0, 1] = 3
    assert sequences == Sequences(PLACES) and sequences.tensor.tolist()[0] == [0, 5]
    with torch.inference_mode():
        assert not Sequences(PLACES).tensor.is_inference()


@pytest.mark.parametrize("places", [[], [(0, 0)], [(3, 0), (3, 0)]])
def test_without_rows_there_is_one_length(places: list[tuple[int, int]]) -> None:
    sequences = Sequences(places)
    assert sequences.lengths() == [0] and sequences.tensor.shape == (len(places), 2)


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([(0, 5, 1)], TypeError),
        ([1, 2], TypeError),
        ([(0, "a")], TypeError),
        ([(0, 2**70)], TypeError),
        (5, TypeError),
        ([(0, 5), (5, -1)], ValueError),
        (torch.zeros(2, 2, dtype=torch.int32), ValueError),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError),
        (torch.zeros(2, dtype=torch.int64), ValueError),
        (torch.zeros(2, 2, dtype=torch.int64, device="meta"), ValueError),
    ],
)
def test_anything_else_is_refused(table: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="sequences must (be|have)"):
        Sequences(table)
