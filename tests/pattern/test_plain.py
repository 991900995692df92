"""What is refused of tensors that are more than rows of numbers, by functions and operators."""

from __future__ import annotations

import pytest
import torch
from torch.masked import as_masked_tensor

from dilated_attention_pytorch import (
    DilatedKVCache,
    attention_mass,
    attention_weights,
    dilated_attention,
    dilated_attention_with_kvcache,
    ops,
)

BRANCHES = ([8, 20], [1, 2])
ROWS = torch.randn(1, 20, 2, 4)
NESTED = torch.nested.nested_tensor(
    [torch.randn(5, 2, 4), torch.randn(9, 2, 4)], layout=torch.jagged
)


def append(x):
    DilatedKVCache(1, 2, 4, *BRANCHES).append(x, x)


CALLS = {
    "function": lambda x: dilated_attention(x, x, x, *BRANCHES),
    "operator": lambda x: ops.attention(x, x, x, *BRANCHES),
    "block": lambda x: ops.attention_block(x, x, x, 20, 0, 0, *BRANCHES),
    "gather": lambda x: ops.gather(x, 8, 2),
    "weights": lambda x: attention_weights(x, x, *BRANCHES, positions=[0]),
    "mass": lambda x: attention_mass(x, x, *BRANCHES),
    "full cache": lambda x: dilated_attention_with_kvcache(x, x, x, 20, *BRANCHES),
    "cache": append,
}
OPERATORS = {"function", "operator", "block", "gather"}


@pytest.mark.parametrize("call", CALLS)
def test_sparse_and_quantized_tensors(call):
    quantized = torch.quantize_per_tensor(ROWS, 0.1, 0, torch.qint8)
    rule = "must be dense and not quantized" if call in OPERATORS else "must be a plain tensor"
    for x in (ROWS.to_sparse(), ROWS.to_mkldnn(), quantized):
        with pytest.raises(ValueError, match=f"(query|key|key_cache|input):? {rule}, got"):
            CALLS[call](x)


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"function"}))
def test_nested_tensors(call):
    with pytest.raises(ValueError, match="must (be a plain tensor|not be nested), got a .*ested"):
        CALLS[call](NESTED)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("call", sorted(CALLS.keys() - OPERATORS | {"function"}))
def test_masked_tensors(call):
    masked = as_masked_tensor(ROWS, torch.ones_like(ROWS, dtype=torch.bool))
    with pytest.raises(ValueError, match="must be a plain tensor,.* got a MaskedTensor"):
        CALLS[call](masked)


def test_subclasses_that_only_add_methods_are_taken():
    class Mine(torch.Tensor):
        pass

    mine = ROWS.as_subclass(Mine)
    torch.testing.assert_close(
        dilated_attention(mine, mine, mine, *BRANCHES).as_subclass(torch.Tensor),
        dilated_attention(ROWS, ROWS, ROWS, *BRANCHES),
    )
