"""The module _C: what Python sees of the planner's result."""

import gc
import warnings

import pytest
import torch

from dilated_attention_pytorch import _C

FIELDS = {
    "seq_len": 1000,
    "segment_lengths": [64, 256],
    "dilation_rates": [1, 4],
    "head_offsets": [0, 0, 0, 1],
    "heads": 2,
    "kv_heads": 2,
    "is_causal": False,
    "zero_padding": False,
    "query_begin": 0,
    "query_end": -1,
    "key_begin": 0,
    "key_end": -1,
    "row_tile": 64,
}


def test_words_are_shared_and_outlive_their_owner() -> None:
    words = _C.plan(**FIELDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.frombuffer warns about memory that it may not write
        tensor = torch.frombuffer(words, dtype=torch.int32)
        other = torch.frombuffer(words, dtype=torch.int32)
    assert len(words) == tensor.numel() == tensor[1]  # the header's second word is the length
    assert tensor.data_ptr() == other.data_ptr()
    before = tensor.clone()
    del words, other
    gc.collect()
    _C.plan(**FIELDS | {"seq_len": 2000})
    assert torch.equal(tensor, before)


def test_buffer_is_of_int32() -> None:
    view = memoryview(_C.plan(**FIELDS))
    assert (view.format, view.itemsize, view.ndim, view.readonly) == ("i", 4, 1, False)


def test_report_counts() -> None:
    numbers = _C.report(**FIELDS)
    names = {"nominal", "distinct", "computed", "bytes", "tiles", "groups", "runs"}
    assert set(numbers) == names
    assert numbers["bytes"] == 4 * len(_C.plan(**FIELDS))
    assert 0 < numbers["distinct"] < numbers["nominal"]


@pytest.mark.parametrize(
    "name, value",
    [("seq_len", -1), ("segment_lengths", [64, 0]), ("dilation_rates", [1, -4]), ("row_tile", 0)],
)
def test_value_error_names_the_argument(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        _C.plan(**FIELDS | {name: value})


@pytest.mark.parametrize("name, value", [("seq_len", 10.5), ("segment_lengths", "64")])
def test_wrong_type_is_a_type_error(name: str, value: object) -> None:
    with pytest.raises(TypeError):
        _C.plan(**FIELDS | {name: value})
