"""Dropout: an explicit mask from a hash of (seed, batch, head, query, key), the same in forward
and backward.
"""

from __future__ import annotations

import pytest
import torch

from tests.conftest import Exact, make_qkv
from tests.ops.calls import Tensors, check_attention, run_operator
from tests.reference import dropout_keep


def seed_tensor(seed: int, device: str) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int64, device=device)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_mask_of_the_hash_drops_the_given_share(probability: float) -> None:
    keep = dropout_keep(1234, probability, 2, 4, (0, 256), (0, 256))
    count = keep.numel()
    # Five standard deviations of a binomial share; also along every axis, where a weak hash would
    # show stripes.
    spread = (probability * (1 - probability)) ** 0.5
    assert abs(keep.double().mean() - (1 - probability)) <= 5 * spread / count**0.5
    for axis in range(4):
        other = [d for d in range(4) if d != axis]
        share = keep.double().mean(other)
        size = count / keep.shape[axis]
        assert (share - (1 - probability)).abs().max() <= 6 * spread / size**0.5


def test_masks_of_neighbouring_rows_seeds_and_batches_are_independent() -> None:
    keep = dropout_keep(77, 0.5, 2, 2, (0, 400), (0, 400)).double() - 0.5
    other_seed = dropout_keep(78, 0.5, 2, 2, (0, 400), (0, 400)).double() - 0.5
    pairs = {
        "rows": (keep[..., 1:, :], keep[..., :-1, :]),
        "columns": (keep[..., 1:], keep[..., :-1]),
        "heads": (keep[:, 0], keep[:, 1]),
        "batches": (keep[0], keep[1]),
        "seeds": (keep, other_seed),
        "transpose": (keep, keep.mT),
    }
    for name, (a, b) in pairs.items():
        correlation = 4 * (a * b).mean().item()
        assert abs(correlation) <= 6 / a.numel() ** 0.5 * 2**0.5, name


def unit_values(device: str, exact: Exact, seq_len: int = 128) -> Tensors:
    """Equal scores and value rows of the identity: out is the mask itself, over seq_len and 1 -
    p.
    """
    q, k, _ = make_qkv(seq_len, 2, seq_len, batch=2, dtype=exact.dtype, device=device)
    v = torch.eye(seq_len, dtype=exact.dtype, device=device)[None, :, None].expand(2, -1, 2, -1)
    return q * 0, k, v


@pytest.mark.parametrize("seed", [0, 42, -1, 2**62 + 12345])
def test_operator_draws_exactly_this_mask(seed: int, device: str, exact: Exact) -> None:
    q, k, v = unit_values(device, exact)
    p = 0.25
    out, lse = torch.ops.dilated.attention(
        q, k, v, [128], [1], dropout_p=p, dropout_seed=seed_tensor(seed, device)
    )
    drawn = (out * 128 * (1 - p)).transpose(1, 2).cpu()
    keep = dropout_keep(seed, p, 2, 2, (0, 128), (0, 128))
    torch.testing.assert_close(drawn, keep.to(drawn.dtype), rtol=0, atol=1e-4)
    _, without = torch.ops.dilated.attention(q, k, v, [128], [1])
    assert torch.equal(lse, without), "the log-sum-exp is that of all pairs"


def test_no_small_seed_drops_a_pair_at_any_probability(device: str, exact: Exact) -> None:
    q, _, _ = make_qkv(64, 1, 8, dtype=exact.dtype, device=device)
    expected, _ = torch.ops.dilated.attention(q, q, q, [64], [1], is_causal=True)
    for seed in range(64):
        out, _ = torch.ops.dilated.attention(
            q,
            q,
            q,
            [64],
            [1],
            is_causal=True,
            dropout_p=1e-6,
            dropout_seed=seed_tensor(seed, device),
        )
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("probability", [0.25, 0.5])
def test_outputs_and_gradients_are_those_of_the_mask(
    probability: float, padding: str, is_causal: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(101, 6, 16, batch=2, kv_heads=2, dtype=exact.dtype, device=device)
    check_attention(
        tensors,
        [16, 48],
        [1, 3],
        exact,
        is_causal=is_causal,
        padding=padding,
        dropout_p=probability,
        dropout_seed=seed_tensor(2024, device),
    )


def test_mask_belongs_to_the_position_not_to_the_branch(device: str, exact: Exact) -> None:
    # The same pairs through one branch or through two: multiplicity 2 and multiplicity 1 give the
    # same output.
    tensors = make_qkv(64, 2, 16, dtype=exact.dtype, device=device)
    options = {"dropout_p": 0.5, "dropout_seed": seed_tensor(3, device)}
    once = run_operator(tensors, [32], [1], with_grad_lse=False, **options)
    twice = run_operator(tensors, [32, 32], [1, 1], with_grad_lse=False, **options)
    torch.testing.assert_close(once.out, twice.out, rtol=0, atol=exact.forward)
    torch.testing.assert_close(once.grad_key, twice.grad_key, rtol=0, atol=exact.backward)


def test_probability_zero_is_no_dropout(device: str, exact: Exact) -> None:
    tensors = make_qkv(64, 4, 16, dtype=exact.dtype, device=device)
    plain = run_operator(tensors, [16, 32], [1, 2])
    zero = run_operator(
        tensors, [16, 32], [1, 2], dropout_p=0.0, dropout_seed=seed_tensor(1, device)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))


def test_seeds_decide(device: str, exact: Exact) -> None:
    tensors = make_qkv(64, 4, 16, dtype=exact.dtype, device=device)
    outs = [
        run_operator(
            tensors, [16, 32], [1, 2], dropout_p=0.5, dropout_seed=seed_tensor(seed, device)
        ).out
        for seed in (1, 1, 2)
    ]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_expectation_is_attention_without_dropout(device: str, exact: Exact) -> None:
    tensors = make_qkv(32, 2, 8, dtype=exact.dtype, device=device)
    plain, _ = torch.ops.dilated.attention(*tensors, [32], [1])
    draws = torch.stack(
        [
            torch.ops.dilated.attention(
                *tensors, [32], [1], dropout_p=0.3, dropout_seed=seed_tensor(seed, device)
            )[0]
            for seed in range(400)
        ]
    )
    standard_error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - plain).abs() <= 5.5 * standard_error + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_probability_that_rounds_to_one_leaves_nothing(dtype: torch.dtype, device: str) -> None:
    tensors = make_qkv(100, 2, 16, dtype=dtype, device=device)
    options = {"dropout_p": 1 - 1e-9, "dropout_seed": seed_tensor(1, device)}
    result = run_operator(tensors, [32], [1], with_grad_lse=False, **options)
    assert not result.out.any() and not result.grad_value.any()
