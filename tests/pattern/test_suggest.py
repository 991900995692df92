"""Suggested branches: they cover a sequence whole, at a cost that does not grow with it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from dilated_attention_pytorch import suggest_branches
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches


def test_lengths_and_rates_grow_together_to_the_whole_sequence() -> None:
    assert suggest_branches(131072) == ([2048, 8192, 32768, 131072], [1, 4, 16, 64])
    assert suggest_branches(131073)[0][-1] == 524288
    assert suggest_branches(16384, dense=1024, growth=2) == (
        [1024, 2048, 4096, 8192, 16384],
        [1, 2, 4, 8, 16],
    )


def test_a_short_sequence_is_attended_to_in_full() -> None:
    assert suggest_branches(1) == suggest_branches(2048) == ([2048], [1])


def test_numbers_of_other_types_become_plain_ones() -> None:
    lengths, rates = suggest_branches(np.int64(5000), dense=np.int32(1024))  # type: ignore[arg-type]
    assert {type(number) for number in lengths + rates} == {int}


@pytest.mark.parametrize("seq_len", [1000, 20000, 70001])
def test_the_pairs_of_a_query_stay_below_the_promise(seq_len: int) -> None:
    lengths, rates = suggest_branches(seq_len, dense=256)
    branches = make_branches(lengths, rates)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing about them is odd
        pattern = Pattern.plan(PatternSpec(seq_len, branches, "interleaved", 64, 64))
    assert pattern.report()["nominal"] / 64 / seq_len < 256 * 4 / 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1 and below 2\\^31 - 1, got 0"),
        ({"seq_len": 2**31 - 1}, ValueError, "seq_len .* below 2\\^31 - 1, got 2147483647"),
        ({"seq_len": 1.5}, TypeError, "seq_len must be an integer, got 1.5"),
        ({"seq_len": 9, "dense": 63}, ValueError, "dense must be at least 64 .*, got 63"),
        ({"seq_len": torch.empty((), device="meta")}, TypeError, "seq_len must be an integer"),
        (
            {"seq_len": 2**31 - 2, "dense": 64, "growth": 46341},
            ValueError,
            "growth must keep dilation rates below 2\\^31, got 46341",
        ),
        ({"seq_len": 9, "growth": 1}, ValueError, "growth must be at least 2 .*, got 1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        suggest_branches(**arguments)
