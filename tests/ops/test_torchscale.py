"""head_offsets="blocked" with padding="zeros" is torchscale's arithmetic, on which GigaPath's
weights depend.
"""

from __future__ import annotations

import pytest
import torch

from dilated_attention_pytorch import dilated_attention
from tests.conftest import Exact, make_qkv
from tests.reference import blocked_table
from tests.torchscale_reference import torchscale_attention

RATES = [1, 2, 4, 8, 16]
GIGAPATH = [1024, 5792, 32768, 185363, 1048576]
SMALL = [64, 362, 2048, 11585, 65536]  # GigaPath's ratios, over 16


def torchscale_is_aligned(lengths: list[int], seq_len: int) -> bool:
    """torchscale misplaces segments whose length the rate doesn't divide, unless there is only
    one.
    """
    pairs = zip(lengths, RATES, strict=True)
    return all(min(w, seq_len) == seq_len or w % r == 0 for w, r in pairs)


@pytest.mark.parametrize(
    ("lengths", "seq_len", "head_dim"),
    [
        (GIGAPATH, 1069, 48),
        (GIGAPATH, 492, 48),
        (SMALL, 69, 48),
        (SMALL, 363, 24),
        (SMALL, 901, 16),
        ([64, 132, 268, 544, 1040], 1101, 8),  # several segments that don't nest, in every branch
        ([16, 36, 84, 200, 464], 611, 8),
    ],
)
def test_equals_torchscale(
    lengths: list[int], seq_len: int, head_dim: int, device: str, exact: Exact
) -> None:
    assert torchscale_is_aligned(lengths, seq_len)
    q, k, v = make_qkv(seq_len, 16, head_dim, dtype=exact.dtype, device=device)
    out, lse = torch.ops.dilated.attention(
        q, k, v, lengths, RATES, head_offsets=blocked_table(RATES, 16), padding="zeros"
    )
    expected_out, expected_lse = torchscale_attention(q, k, v, lengths, RATES)
    assert (out.cpu() - expected_out).abs().max() <= exact.forward
    assert (lse.cpu() - expected_lse).abs().max() <= 10 * exact.forward


@pytest.mark.parametrize(
    ("heads", "lengths", "rates"),
    [
        (12, [40, 80], [1, 8]),
        (6, [40, 80], [4, 5]),
        (3, [40, 80], [2, 16]),
        (
            8,
            [30, 50],
            [4, 7],
        ),  # rates that don't divide the segments: zero keys in full segments too
    ],
)
def test_what_the_rates_do_not_divide(
    heads: int, lengths: list[int], rates: list[int], device: str, exact: Exact
) -> None:
    q, k, v = make_qkv(201, heads, 8, dtype=exact.dtype, device=device)
    out, lse = torch.ops.dilated.attention(
        q, k, v, lengths, rates, head_offsets=blocked_table(rates, heads), padding="zeros"
    )
    expected_out, expected_lse = torchscale_attention(q, k, v, lengths, rates)
    assert (out.cpu() - expected_out).abs().max() <= exact.forward
    assert torch.equal(torch.isneginf(lse).cpu(), torch.isneginf(expected_lse))
    covered = torch.isfinite(expected_lse)
    assert (lse.cpu() - expected_lse)[covered].abs().max() <= exact.forward


def test_public_function_takes_torchscale_settings_by_name() -> None:
    q, k, v = make_qkv(363, 16, 16)
    out, lse = dilated_attention(
        q, k, v, SMALL, RATES, head_offsets="blocked", padding="zeros", return_lse=True
    )
    expected_out, expected_lse = torchscale_attention(q, k, v, SMALL, RATES)
    assert (out - expected_out).abs().max() <= 1e-12
    assert (lse - expected_lse).abs().max() <= 1e-12
