"""Batches of several lengths over a group: padded and packed, against one process's call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    DilatedAttention,
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_varlen,
)
from dilated_attention_pytorch.ring import ShardLayout, shard_positions
from tests.conftest import make_qkv
from tests.ops.calls import output_gradients
from tests.ring.processes import Processes, group_of

BRANCHES = ([9, 24, 60], [1, 2, 4])
SEQ_LEN = 54
LENGTHS = [54, 1, 0, 37]
LEFT = [(0, 54), (53, 1), (54, 0), (17, 37)]
SHARDS: dict[str, tuple[ShardLayout, list[int] | None]] = {
    "equal": ("contiguous", None),
    "unequal": ("contiguous", [20, 0, 34]),
    "zigzag": ("zigzag", None),
    "unequal zigzag": ("zigzag", [3, 11, 0, 25, 9, 6]),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "padding": "zeros", "head_offsets": "blocked"},
]


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor], rows: Tensor) -> list[Tensor]:
    """By weights that are NaN where the out is of padding."""
    out, lse = outputs
    grad_out, grad_lse = output_gradients(torch.zeros(len(LENGTHS), SEQ_LEN, *out.shape[2:]))
    where = lse.detach() == -torch.inf
    grad_lse = grad_lse[:, :, rows].double().masked_fill(where, torch.nan)
    grad_out = grad_out[:, rows].double().masked_fill(where.transpose(1, 2)[..., None], torch.nan)
    return list(torch.autograd.grad([out, lse], inputs, [grad_out, grad_lse]))


def attend_padded(size: int, shards: str, seq_lens: Any, options: dict[str, Any]) -> None:
    """Of rows that are NaN in padding; each rank compares its own."""
    group = group_of(size)
    layout, lengths = SHARDS[shards]
    given: dict[str, Any] = {"shard_lengths": lengths, "shard_layout": layout}
    rows = shard_positions(SEQ_LEN, group, **given)
    pairs = torch.tensor(LEFT if seq_lens == LEFT else [(0, n) for n in LENGTHS])
    places = torch.arange(SEQ_LEN)[:, None]
    kept = torch.stack([(places >= f) & (places < f + n) for f, n in pairs.tolist()])[..., None]
    whole = [
        x.where(kept, torch.nan).requires_grad_()
        for x in make_qkv(SEQ_LEN, 4, 8, batch=len(LENGTHS), kv_heads=2)
    ]
    mine = [x.detach()[:, rows].requires_grad_() for x in whole]
    options = options | {"seq_lens": seq_lens, "return_lse": True}
    expected = dilated_attention(*whole, *BRANCHES, **options)
    wanted = gradients(expected, whole, torch.arange(SEQ_LEN))
    for strategy in ("ring", "gather", "auto"):
        actual = dilated_attention(
            *mine, *BRANCHES, group=group, strategy=strategy, **given, **options
        )
        torch.testing.assert_close(actual[0], expected[0][:, rows], rtol=0, atol=1e-12)
        torch.testing.assert_close(actual[1], expected[1][:, :, rows], rtol=0, atol=1e-12)
        found = gradients(actual, mine, rows)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs[:, rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seq_lens", [LENGTHS, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("shards", SHARDS)
def test_padded_batches(
    workers: Processes, shards: str, seq_lens: Any, options: dict[str, Any]
) -> None:
    workers.run(3, attend_padded, shards, seq_lens, options)


def attend_packed(size: int, shards: str, dropout_p: float) -> None:
    group = group_of(size)
    layout, lengths = SHARDS[shards]
    given: dict[str, Any] = {"shard_lengths": lengths, "shard_layout": layout}
    rows = shard_positions(SEQ_LEN, group, **given)
    whole = [x[0].requires_grad_() for x in make_qkv(SEQ_LEN, 4, 8)]
    mine = [x.detach()[rows].requires_grad_() for x in whole]
    offsets = [0, 7, 7, 31, 50]  # rows 50 to 53 are padding
    call = (offsets, *BRANCHES)
    torch.manual_seed(3)
    expected = dilated_attention_varlen(*whole, *call, is_causal=True, dropout_p=dropout_p)
    torch.manual_seed(3)
    actual = dilated_attention_varlen(
        *mine, *call, is_causal=True, dropout_p=dropout_p, group=group, **given
    )
    torch.testing.assert_close(actual, expected[rows], rtol=0, atol=1e-12)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    found = torch.autograd.grad(actual, mine, weights[rows])
    for ours, theirs in zip(found, torch.autograd.grad(expected, whole, weights), strict=True):
        torch.testing.assert_close(ours, theirs[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("shards", SHARDS)
def test_packed_sequences_may_cross_ranks(
    workers: Processes, shards: str, dropout_p: float
) -> None:
    workers.run(3, attend_packed, shards, dropout_p)


def project_and_attend(size: int, layout: ShardLayout) -> None:
    """A layer keeps what padding holds out of its parameters' gradients."""
    group = group_of(size)
    rows = shard_positions(SEQ_LEN, group, shard_layout=layout)
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": torch.float64}
    alone = MultiheadDilatedAttention(32, 4, *BRANCHES, **options)
    ours = MultiheadDilatedAttention(32, 4, *BRANCHES, group=group, shard_layout=layout, **options)
    ours.load_state_dict(alone.state_dict())
    x = torch.randn(len(LENGTHS), SEQ_LEN, 32, dtype=torch.float64)
    for row, length in enumerate(LENGTHS):
        x[row, length:] = torch.nan
    expected, _ = alone(x, seq_lens=LENGTHS)
    actual, _ = ours(x[:, rows], seq_lens=LENGTHS)
    torch.testing.assert_close(actual, expected[:, rows], rtol=0, atol=1e-12)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for mine, whole in zip(ours.parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None and whole.grad is not None
        total = mine.grad.clone()
        torch.distributed.all_reduce(total, group=group)
        torch.testing.assert_close(total, whole.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_layers_take_lengths(workers: Processes, layout: ShardLayout) -> None:
    workers.run(3, project_and_attend, layout)


def attend_without_padding(size: int) -> None:
    group = group_of(size)
    mine = make_qkv(18, 4, 8, batch=2)
    attention = DilatedAttention(*BRANCHES, group=group)
    assert torch.equal(attention(*mine, seq_lens=[54, 54]), attention(*mine))


def test_a_batch_without_padding_is_an_ordinary_call(workers: Processes) -> None:
    workers.run(3, attend_without_padding)


def attend_to_nothing(size: int) -> None:
    group = group_of(size)
    mine = make_qkv(18, 4, 8, batch=0)
    assert dilated_attention(*mine, *BRANCHES, group=group, seq_lens=[]).shape == mine[0].shape


def test_a_batch_of_none(workers: Processes) -> None:
    workers.run(3, attend_to_nothing)


def compare_lengths(size: int) -> str:
    group = group_of(size)
    mine = make_qkv(18, 4, 8, batch=2)
    try:
        dilated_attention(*mine, *BRANCHES, group=group, seq_lens=[54, 40 + group.rank()])
    except ValueError as error:
        return str(error)
    return ""


def test_lengths_have_to_agree(workers: Processes) -> None:
    for text in workers.run(3, compare_lengths):
        assert "sequences" in text and "(54, 41)" in text
