"""Weights of single queries and the mass of keys, against the dense definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import attention_mass, attention_weights, head_group_offsets
from tests.conftest import Exact, make_qkv
from tests.reference import blocked_table, reference_attention

CASES: list[tuple[list[int], list[int], dict[str, Any]]] = [
    ([16, 50, 200], [1, 4, 8], {}),
    ([16, 50, 200], [1, 4, 8], {"is_causal": True}),
    ([16, 33, 70], [1, 2, 4], {"padding": "zeros", "head_offsets": blocked_table([1, 2, 4], 4)}),
    ([16, 33], [2, 3], {"padding": "zeros", "is_causal": True, "scale": 0.7}),  # holes
    ([40, 40], [1, 2], {"head_offsets": torch.tensor(head_group_offsets([1, 2], 4))}),
]


def weights_of_all(q: Tensor, k: Tensor, lengths: Any, rates: Any, **options: Any) -> Tensor:
    """float64 [batch, heads, queries, keys], from the reference with one-hot values."""
    eye = torch.eye(k.shape[1], dtype=torch.float64)
    values = eye[None, :, None].expand(*k.shape[:3], -1)
    out, _ = reference_attention(q, k, values, lengths, rates, **options)
    return out.transpose(1, 2)


@pytest.mark.parametrize(("lengths", "rates", "options"), CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_weights_of_some_queries(
    lengths: Any, rates: Any, options: Any, kv_heads: int, device: str, exact: Exact
) -> None:
    q, k, _ = make_qkv(117, kv_heads=kv_heads, batch=2, dtype=exact.dtype, device=device)
    positions = [116, 0, 33, 47]
    found = attention_weights(q, k, lengths, rates, positions=positions, **options)
    expected = weights_of_all(q, k, lengths, rates, **options)[:, :, positions]
    assert (found.dense(117).cpu() - expected).abs().max() <= exact.forward
    for head in range(4):
        for index in range(4):
            keys, weights = found.row(head, index)
            row = expected[0, head, index]
            assert keys.tolist() == row.nonzero().flatten().tolist()  # each once, ascending
            torch.testing.assert_close(
                weights[0].cpu().double(), row[keys.cpu()], rtol=0, atol=exact.forward
            )


@pytest.mark.parametrize(("lengths", "rates", "options"), CASES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_mass(
    lengths: Any, rates: Any, options: Any, kv_heads: int, device: str, exact: Exact
) -> None:
    q, k, _ = make_qkv(117, kv_heads=kv_heads, batch=2, dtype=exact.dtype, device=device)
    mass = attention_mass(q, k, lengths, rates, **options)
    expected = weights_of_all(q, k, lengths, rates, **options).sum(2)
    assert (mass.cpu() - expected).abs().max() <= exact.backward


def test_zero_keys_take_their_share_and_uncovered_rows_are_empty() -> None:
    q, k, _ = make_qkv(20)
    found = attention_weights(q, k, [16], [1], positions=[0, 19], padding="zeros")
    sums = found.dense(20).sum(-1)[0]
    assert (sums[:, 0] - 1).abs().max() < 1e-12 and (sums[:, 1] < 0.8).all()
    assert attention_mass(q, k, [16], [1], padding="zeros").sum() < 4 * 20 - 4 * 0.2
    found = attention_weights(q, k, [20], [2], positions=[3])  # heads 1 and 3 only
    assert found.begins.tolist() == [0, 0, 10, 10, 20]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    q, k, _ = make_qkv(1000, dtype=dtype, device=device)
    mass = attention_mass(q, k, [1000], [1])
    expected = weights_of_all(q, k, [1000], [1]).sum(2)
    assert mass.dtype == torch.float32
    assert (mass.cpu() - expected).norm() < 4e-3 * expected.norm()
    found = attention_weights(q, k, [1000], [1], positions=[7])
    assert found.weights.dtype == torch.float32
    assert (found.weights.sum(1) - 4).abs() < 1e-5


def test_weights_have_gradients_and_the_mass_has_none() -> None:
    q, k, _ = make_qkv(30, heads=2, head_dim=4, requires_grad=True)

    def weights(query: Tensor, key: Tensor) -> Tensor:
        return attention_weights(query, key, [8, 30], [1, 4], positions=[3, 29]).weights

    assert torch.autograd.gradcheck(weights, (q, k))
    assert not attention_mass(q, k, [8], [1]).requires_grad


def test_under_autocast_the_inputs_dtype_counts() -> None:
    q, k, _ = make_qkv(64, dtype=torch.float32)
    expected = attention_mass(q, k, [64], [1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_mass(q, k, [64], [1]), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"positions": [20]}, ValueError, "positions must be at least 0 and below 20, got 20"),
        ({"positions": [-1]}, ValueError, "positions must be at least 0 and below 20, got -1"),
        ({"positions": [0.5]}, TypeError, "positions must be an integer, got 0.5"),
        ({"positions": 3}, TypeError, "positions must be a sequence of integers, got 3"),
        ({"padding": "reflect"}, ValueError, "padding must be 'masked' or 'zeros'"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"is_causal": 1}, TypeError, "is_causal must be a bool, got 1"),
        ({"query": "query"}, TypeError, "query must be a tensor, got str"),
        ({"key": torch.zeros(1, 20, 4)}, ValueError, "key must be .batch, seq_len, heads"),
        ({"key": torch.zeros(1, 20, 3, 16)}, ValueError, "key: must have heads that divide"),
        ({"key": torch.zeros(1, 19, 4, 16)}, ValueError, "key: must have the batch and seq_len of"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    x = torch.zeros(1, 20, 4, 16)
    arguments: dict[str, Any] = {"query": x, "key": x, "positions": [0]} | changes
    with pytest.raises(error, match=message):
        attention_weights(segment_lengths=[8], dilation_rates=[1], **arguments)
    if "positions" not in changes:
        del arguments["positions"]
        with pytest.raises(error, match=message):
            attention_mass(segment_lengths=[8], dilation_rates=[1], **arguments)
