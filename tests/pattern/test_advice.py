"""Warnings about patterns that are seldom meant: each kind once, and none for what is usual."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from dilated_attention_pytorch import PatternCache, dilated_attention, head_group_offsets
from dilated_attention_pytorch.pattern import PatternSpec, advice, make_branches


@pytest.fixture(autouse=True)
def nothing_was_said() -> Iterator[None]:
    said = advice._given.copy()
    advice._given.clear()
    yield
    advice._given.update(said)


def spec(seq_len: int, lengths: list[int], rates: list[int], **options: object) -> PatternSpec:
    given: dict[str, object] = {"head_offsets": "interleaved", "heads": 8, "kv_heads": 8}
    return PatternSpec(seq_len, make_branches(lengths, rates), **{**given, **options})  # type: ignore[arg-type]


ODD = {
    "swapped lists": (spec(64, [1, 64], [16, 1]), "dilation_rates.*a rate of 16 for segments of 1"),
    "every rate above 1": (spec(64, [16, 64], [2, 4]), "position 1 for head 0: such outputs are 0"),
    "the same lattice twice": (spec(64, [16, 64], [2, 2]), "position 1 for head 0"),
    "a head in no branch": (
        spec(64, [16], [1], heads=2, kv_heads=1, head_offsets=((0, -1),)),
        "position 0 for head 1",
    ),
    "groups of heads": (
        spec(64, [16, 64], [1, 4], head_offsets=head_group_offsets([1, 4], 8)),
        "position 0 for head 4",
    ),
    "small segments": (spec(2**16, [4], [1]), "segment_lengths should be at least 16 times.*4"),
    "few rows between ends": (spec(2**16, [2, 4096], [1, 1]), "about 8 times the pairs"),
    "zeros, a rate that does not divide": (
        spec(50_000, [1024, 5793], [1, 2], padding="zeros"),
        "multiples of their dilation rates.*5793 with a rate of 2",
    ),
}
USUAL = {
    "LongNet": spec(131072, [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12]),
    "the factories": spec(50_001, [2048, 4096, 8192], [1, 2, 4], is_causal=True),
    "GigaPath": spec(10_000, [1024, 5792, 32768, 185363], [1, 2, 4, 8], padding="zeros"),
    "a small example": spec(37, [8, 20], [1, 2]),
    "one position each": spec(10, [1], [1]),
    "two lattices, together all": spec(
        64, [16, 64], [2, 2], heads=1, kv_heads=1, head_offsets=((0,), (1,))
    ),
    "a clipped segment": spec(1000, [64, 1001], [1, 2], padding="zeros"),
    "nothing": spec(0, [8], [1]),
    "short tiles are for these": spec(2**16, [16, 64], [1, 4]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_patterns_are_named_once(name: str) -> None:
    odd, message = ODD[name]
    with pytest.warns(UserWarning, match=message):
        advice.advise(odd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advice.advise(odd)


@pytest.mark.parametrize("name", USUAL)
def test_usual_patterns_are_not(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advice.advise(USUAL[name])


def test_calls_warn_at_the_callers_line_when_they_plan() -> None:
    q = torch.randn(1, 32, 2, 8)
    cache = PatternCache()
    with pytest.warns(UserWarning, match="swapped") as caught:
        dilated_attention(q, q, q, [1, 32], [8, 1], pattern_cache=cache)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dilated_attention(q, q, q, [1, 32], [8, 1], pattern_cache=cache)


def test_what_is_filtered_is_silent() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "dilation_rates should be below")
        advice.advise(spec(64, [1, 64], [16, 1]))
    assert not caught
