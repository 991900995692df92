"""The module _C: what Python sees of the planner's result."""

import gc
import warnings
from typing import Any

import pytest
import torch

from dilated_attention_pytorch import _C

BRANCHES = [_C.Branch(64, 1, [0, 0]), _C.Branch(256, 4, [0, 1])]
FIELDS = {"seq_len": 1000, "branches": BRANCHES, "heads": 2, "kv_heads": 2}


def spec(**changes: Any) -> _C.PatternSpec:
    return _C.PatternSpec(**FIELDS | changes)


def test_words_are_shared_and_outlive_their_owner() -> None:
    words = _C.plan(spec())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.frombuffer warns about memory that it may not write
        tensor = torch.frombuffer(words, dtype=torch.int32)
        other = torch.frombuffer(words, dtype=torch.int32)
    assert len(words) == tensor.numel() == tensor[1]  # the header's second word is the length
    assert tensor.data_ptr() == other.data_ptr()
    before = tensor.clone()
    del words, other
    gc.collect()
    _C.plan(spec(seq_len=2000))
    assert torch.equal(tensor, before)


def test_buffer_is_of_int32() -> None:
    view = memoryview(_C.plan(spec()))
    assert (view.format, view.itemsize, view.ndim, view.readonly) == ("i", 4, 1, False)


def test_report_counts() -> None:
    numbers = _C.report(spec())
    names = {"nominal", "distinct", "computed", "bytes", "tiles", "groups", "runs"}
    assert set(numbers) == names
    assert numbers["bytes"] == 4 * len(_C.plan(spec()))
    assert 0 < numbers["distinct"] < numbers["nominal"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seq_len": -1}, "seq_len"),
        ({"branches": [_C.Branch(0, 1)]}, "segment_lengths"),
        ({"branches": [_C.Branch(64, -4)]}, "dilation_rates"),
        ({"row_tile": 0}, "row_tile"),
    ],
)
def test_value_error_names_the_argument(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        _C.plan(spec(**changes))


@pytest.mark.parametrize("changes", [{"seq_len": 10.5}, {"branches": "64"}, {"keys": 3}])
def test_wrong_type_is_a_type_error(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        spec(**changes)


def test_unknown_field_is_named() -> None:
    with pytest.raises(AttributeError, match="segment_length"):
        spec(segment_length=[64])


def test_fields_read_back() -> None:
    given = spec(is_causal=True, padding=_C.Padding.zeros, queries=[(3, 10)])
    assert (given.seq_len, given.is_causal, given.padding) == (1000, True, _C.Padding.zeros)
    assert (given.queries, given.keys, given.row_tile) == ([(3, 10)], [(0, -1)], None)
    branches = [(b.segment_length, b.dilation_rate, b.head_offsets) for b in given.branches]
    assert branches == [(64, 1, [0, 0]), (256, 4, [0, 1])]
