"""torch's FlopCounterMode: distinct pairs, counted densely, times the products of a pair."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_pytorch import dilated_attention, ops
from tests.reference import blocked_table, interleaved_table, multiplicities

LENGTHS, RATES = [16, 64], [1, 4]
BATCH, SEQ_LEN, HEADS, HEAD_DIM = 2, 100, 4, 8


def rows(heads: int = HEADS) -> torch.Tensor:
    return torch.randn(BATCH, SEQ_LEN, heads, HEAD_DIM, requires_grad=True)


def pairs(table: torch.Tensor, is_causal: bool, **ranges: tuple[int, int]) -> int:
    return int((multiplicities(SEQ_LEN, LENGTHS, RATES, table, is_causal, **ranges) > 0).sum())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
def test_a_pair_is_two_products_forward_and_five_backward(offsets: str, is_causal: bool) -> None:
    table = {"interleaved": interleaved_table, "blocked": blocked_table}[offsets](RATES, HEADS)
    product = BATCH * pairs(table, is_causal) * 2 * HEAD_DIM
    query, key, value = rows(), rows(2), rows(2)
    options = {"head_offsets": offsets, "is_causal": is_causal}
    with FlopCounterMode(display=False) as counter:
        out = dilated_attention(query, key, value, LENGTHS, RATES, **options)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_one_branch_counts_as_what_it_is_composed_of() -> None:
    with FlopCounterMode(display=False) as counter:
        ops.segment_attention(rows(), rows(), rows(), 16, 1)
    exact = multiplicities(SEQ_LEN, [16], [1], interleaved_table([1], HEADS), False)
    assert counter.get_total_flops() == BATCH * int(exact.sum()) * 4 * HEAD_DIM


def test_sequences_add_up_to_a_batch() -> None:
    query, value = rows()[:1], rows()[:1]
    places = torch.tensor([[0, 40], [45, 0], [50, 50]])
    parts = 0
    for first, length in places.tolist():
        part = [x[:, first : first + length] for x in (query, value, value)]
        with FlopCounterMode(display=False) as counter:
            ops.attention(*part, LENGTHS, RATES)[0].sum().backward()
        parts += counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        out, _ = ops.attention(query, value, value, LENGTHS, RATES, sequences=places)
        out.sum().backward()
    assert counter.get_total_flops() == parts


def test_blocks_add_up_to_the_whole() -> None:
    query, value = rows().detach(), rows().detach()
    table = interleaved_table(RATES, HEADS)
    total = 0
    for begin, end in ((0, 30), (30, 100)):
        block = (SEQ_LEN, 0, begin, LENGTHS, RATES)
        part = value[:, begin:end]
        with FlopCounterMode(display=False) as counter:
            out, lse = ops.attention_block(query, part, part, *block)
        forward = counter.get_total_flops()
        exact = BATCH * pairs(table, False, keys=(begin, end)) * 4 * HEAD_DIM
        assert forward == exact
        with FlopCounterMode(display=False) as counter:
            ops.attention_block_backward(out, None, query, part, part, out, lse, *block)
        assert 2 * counter.get_total_flops() == 5 * exact
        sums = torch.zeros(BATCH, HEADS, SEQ_LEN, 16)
        with FlopCounterMode(display=False) as counter:
            ops.attention_block_backward_into(sums, out, None, query, part, part, out, lse, *block)
        assert 2 * counter.get_total_flops() == 5 * exact
        total += forward
    assert total == BATCH * pairs(table, False) * 4 * HEAD_DIM


def test_under_fake_tensors_nothing_is_computed() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q = torch.empty(1, 1000, 4, 16)
        ops.attention(q, q, q, [1000], [1])
    assert counter.get_total_flops() == 4 * 1000**2 * 4 * 16
