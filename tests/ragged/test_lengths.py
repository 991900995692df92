"""Lengths and offsets to sequences, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.pattern import Sequences
from dilated_attention_pytorch.ragged import Table, layout_of, of_offsets, stretches
from dilated_attention_pytorch.ragged.lengths import of_padded

LENGTHS = [3, 0, 5]


def stretches_of(seq_lens: Any, batch: int, seq_len: int) -> Tensor:
    pairs = stretches(seq_lens, batch, seq_len)
    assert pairs is not None
    return pairs


def listed(table: Table | None) -> list[list[int]]:
    assert isinstance(table, Sequences)
    return list(table.tensor.tolist())


FORMS = {
    "list": lambda values: values,
    "tuple": tuple,
    "numpy": np.array,
    "int64": torch.tensor,
    "int32": lambda values: torch.tensor(values, dtype=torch.int32),
    "uint8": lambda values: torch.tensor(values, dtype=torch.uint8),
    "scalars": lambda values: [torch.tensor(value) for value in values],
}


@pytest.mark.parametrize("form", FORMS)
def test_lengths_may_have_any_form(form: str) -> None:
    pairs = stretches_of(FORMS[form](LENGTHS), 3, 5)
    assert pairs.tolist() == [[0, 3], [0, 0], [0, 5]]
    assert pairs.dtype is torch.int64 and pairs.device.type == "cpu"
    assert listed(of_padded(pairs, 3, 5)) == [[0, 3], [5, 0], [10, 5]]
    assert listed(of_offsets(FORMS[form]([0, 3, 3, 8]), 9)) == [[0, 3], [3, 0], [3, 5]]


def test_lengths_come_from_any_device(device: str) -> None:
    pairs = stretches_of(torch.tensor(LENGTHS, device=device), 3, 5)
    assert pairs.tolist() == [[0, 3], [0, 0], [0, 5]] and pairs.device.type == "cpu"


def test_a_default_device_is_not_for_them() -> None:
    with torch.device("meta"):
        assert listed(of_padded([2, 1], 2, 5)) == [[0, 2], [5, 1]]
        assert listed(of_offsets([0, 7], 7)) == [[0, 7]]


def test_pairs_have_a_first_position() -> None:
    assert listed(of_padded([(1, 2), (0, 0), (0, 5)], 3, 5)) == [[1, 2], [5, 0], [10, 5]]


def test_there_may_be_none() -> None:
    assert stretches_of([], 0, 5).shape == (0, 2)
    assert listed(of_padded([], 0, 5)) == listed(of_offsets([0], 7)) == []


def test_equal_lengths_are_looked_at_once() -> None:
    given = torch.tensor(LENGTHS)
    table = of_padded(given, 3, 5)
    assert of_padded(LENGTHS, 3, 5) is table and of_padded(LENGTHS, 3, 6) is not table
    given[1] = 4
    assert listed(of_padded(given, 3, 5)) == [[0, 3], [5, 4], [10, 5]]
    assert listed(table) == [[0, 3], [5, 0], [10, 5]]
    offsets = torch.tensor([0, 3, 9, 9, 9])[::2]
    assert listed(of_offsets(offsets, 9)) == [[0, 9], [9, 0]]


def test_whole_rows_have_no_padding() -> None:
    assert stretches([5, 5], 2, 5) is None
    assert stretches([5, 4], 2, 5) is not None
    assert stretches([(1, 4), (0, 5)], 2, 5) is not None


def test_lengths_alone_say_where_a_batch_lies() -> None:
    rows, table = layout_of(LENGTHS, None)
    assert (rows, listed(table)) == (8, [[0, 3], [3, 0], [3, 5]])
    rows, table = layout_of([(1, 2), (0, 3)], 4)
    assert (rows, listed(table)) == (8, [[1, 2], [4, 3]])
    assert layout_of([4, 4], 4) == (4, None)
    for given, seq_len in ((5, None), (5, 9), ([(0, 3)], None), ([-1], None)):
        with pytest.raises(ValueError, match="seq_lens must be"):
            layout_of(given, seq_len)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([3, 0], ValueError, r"seq_lens must be \[3\] or \[3, 2\], .*, got shape \(2,\)"),
        (torch.zeros(3, 3, dtype=torch.int64), ValueError, r"must be .* got shape \(3, 3\)"),
        (7, ValueError, r"seq_lens must be \[3\] .*, got shape \(\)"),
        ([3, -1, 5], ValueError, "seq_lens must be at least 0, got -1"),
        ([(0, 1), (-1, 2), (0, 1)], ValueError, "seq_lens must be at least 0, got -1"),
        ([3, 6, 5], ValueError, "seq_lens must end at seq_len, 5, or before, got 6"),
        ([(0, 1), (4, 2), (0, 1)], ValueError, "seq_lens must end at seq_len, 5, .* got 6"),
        ([3.0, 1.0, 2.0], TypeError, r"seq_lens must be integers, .*, got \[3.0, 1.0, 2.0\]"),
        ([True, True, False], TypeError, "seq_lens must be integers"),
        (torch.ones(3), TypeError, "seq_lens must be integers"),
        (["3", "1", "2"], TypeError, "seq_lens must be integers"),
        ([[1], [1, 2], [3]], TypeError, "seq_lens must be integers"),
    ],
)
def test_lengths_that_fit_no_batch_are_refused(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        stretches(given, 3, 5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1, 3], ValueError, "cu_seqlens must begin with 0, got 1"),
        ([0, 3, 2, 9], ValueError, "cu_seqlens must not descend, got 2 after 3"),
        ([0, 3, 10], ValueError, "cu_seqlens must end at the number of rows, 9, .* got 10"),
        ([], ValueError, r"cu_seqlens must be \[sequences \+ 1\], .*, got shape \(0,\)"),
        ([[0, 3]], ValueError, r"cu_seqlens must be .*, got shape \(1, 2\)"),
        ([0.0, 3.0], TypeError, "cu_seqlens must be integers"),
        (None, TypeError, "cu_seqlens must be integers, .*, got None"),
    ],
)
def test_offsets_that_fit_no_rows_are_refused(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        of_offsets(given, 9)
