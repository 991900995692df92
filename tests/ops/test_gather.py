"""gather and scatter_add against index arithmetic, each the other's transpose; their in-place
forms.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

DTYPES = {
    "cpu": [torch.float16, torch.bfloat16, torch.float32, torch.float64],
    "cuda": [torch.float16, torch.bfloat16, torch.float32],
}
CASES = [
    # (length, segment_length, rate, start)
    (64, 16, 4, 0),
    (61, 16, 3, 0),
    (61, 16, 3, 7),
    (61, 16, 3, 16),
    (5, 16, 3, 13),
    (40, 10**9, 4, 3),
    (10, 3, 8, 2),
    (1, 1, 1, 0),
    (33, 1, 2, 5),
    (0, 16, 2, 4),
    (30, 7, 1, 1000003),
]


def slot_positions(length: int, w: int, r: int, start: int, offset: int) -> list[int]:
    """The position that each slot of one head stands for, -1 for none, piece by piece."""
    slots: list[int] = []
    begin = start
    while begin < start + length:
        end = min(begin // w * w + w, start + length)
        held = [p for p in range(begin, end) if (p % w) % r == offset]
        slots += held + [-1] * (-(-(end - begin) // r) - len(held))
        begin = end
    return slots


def expected_gather(x: Tensor, w: int, r: int, start: int, offsets: list[int]) -> Tensor:
    columns = []
    for head, offset in enumerate(offsets):
        at = torch.tensor(slot_positions(x.shape[1], w, r, start, offset), dtype=torch.int64)
        rows = torch.zeros(x.shape[0], len(at), x.shape[3], dtype=x.dtype)
        rows[:, at >= 0] = x[:, at[at >= 0] - start, head].cpu()
        columns.append(rows)
    return torch.stack(columns, dim=2)


def rows(length: int, dtype: torch.dtype, device: str, heads: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, heads, 12, generator=generator).to(device, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given_offsets", [False, True])
def test_gather_equals_index_arithmetic(
    case: tuple[int, int, int, int], given_offsets: bool, device: str
) -> None:
    length, w, r, start = case
    offsets = [random.Random(h).randint(-1, r - 1) for h in range(5)]
    table = torch.tensor(offsets) if given_offsets else None
    if not given_offsets:
        offsets = [h % r for h in range(5)]
    for dtype in DTYPES[device]:
        x = rows(length, dtype, device)
        packed = torch.ops.dilated.gather(x, w, r, head_offsets=table, start=start)
        assert torch.equal(packed.cpu(), expected_gather(x, w, r, start, offsets))


def test_more_offsets_than_a_launch_carries(device: str) -> None:
    offsets = [head * 7 % 4 - (head % 5 == 0) for head in range(300)]
    offsets = [max(-1, offset) for offset in offsets]
    x = rows(30, torch.float32, device, heads=300)
    packed = torch.ops.dilated.gather(x, 12, 4, head_offsets=torch.tensor(offsets), start=3)
    assert torch.equal(packed.cpu(), expected_gather(x, 12, 4, 3, offsets))


@pytest.mark.parametrize("case", CASES)
def test_scatter_add_adds_at_the_same_places(case: tuple[int, int, int, int], device: str) -> None:
    length, w, r, start = case
    offsets = [-1, 0, r - 1, r // 2, 0]
    table = torch.tensor(offsets)
    for dtype in DTYPES[device]:
        x = rows(length, dtype, device)
        slots = [slot_positions(length, w, r, start, offset) for offset in offsets]
        packed = rows(len(slots[0]), dtype, device, seed=1)
        expected = x.clone()
        for head, positions in enumerate(slots):
            for slot, position in enumerate(positions):
                if position >= 0:
                    expected[:, position - start, head] += packed[:, slot, head]
        before = x.clone()
        summed = torch.ops.dilated.scatter_add(x, packed, w, r, head_offsets=table, start=start)
        assert torch.equal(summed, expected)
        assert torch.equal(x, before), "the input was changed"


@pytest.mark.parametrize("case", CASES)
def test_scatter_add_is_the_transpose_of_gather(
    case: tuple[int, int, int, int], device: str
) -> None:
    length, w, r, start = case
    x = rows(length, DTYPES[device][-1], device)
    packed = torch.ops.dilated.gather(x, w, r, start=start)
    y = torch.randn_like(packed)
    back = torch.ops.dilated.scatter_add(torch.zeros_like(x), y, w, r, start=start)
    assert torch.isclose((packed * y).sum(), (x * back).sum(), rtol=1e-5, atol=1e-4)


def test_gradients(device: str) -> None:
    x = rows(45, DTYPES[device][-1], device).requires_grad_()
    packed = torch.ops.dilated.gather(x, 16, 3, start=5)
    direction = torch.randn_like(packed)
    (grad,) = torch.autograd.grad(packed, x, direction)
    zeros = torch.zeros_like(x)
    assert torch.equal(grad, torch.ops.dilated.scatter_add(zeros, direction, 16, 3, start=5))

    slots = packed.detach().requires_grad_()
    summed = torch.ops.dilated.scatter_add(x, slots, 16, 3, start=5)
    up = torch.randn_like(summed)
    grad_x, grad_slots = torch.autograd.grad(summed, (x, slots), up)
    assert torch.equal(grad_x, up)
    assert torch.equal(grad_slots, torch.ops.dilated.gather(up, 16, 3, start=5))


@pytest.mark.parametrize("start", [0, 5])
def test_gradcheck_first_and_second_order(start: int) -> None:
    table = torch.tensor([0, 2, -1])
    x = torch.randn(1, 17, 3, 2, dtype=torch.float64, requires_grad=True)

    def gather(x: Tensor) -> Tensor:
        packed: Tensor = torch.ops.dilated.gather(x, 6, 3, head_offsets=table, start=start)
        return packed

    def scatter_add(x: Tensor, packed: Tensor) -> Tensor:
        summed: Tensor = torch.ops.dilated.scatter_add(
            x, packed, 6, 3, head_offsets=table, start=start
        )
        return summed

    packed = gather(x).detach().requires_grad_()
    assert torch.autograd.gradcheck(gather, x)
    assert torch.autograd.gradgradcheck(gather, x)
    assert torch.autograd.gradcheck(scatter_add, (x, packed))
    assert torch.autograd.gradgradcheck(scatter_add, (x, packed))


def test_strided_rows(device: str) -> None:
    x = rows(50, torch.float32, device)
    expected = torch.ops.dilated.gather(x, 16, 4)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(torch.ops.dilated.gather(transposed, 16, 4), expected)
    sliced = torch.cat([x, x + 1], dim=-1)[..., :12]
    assert torch.equal(torch.ops.dilated.gather(sliced, 16, 4), expected)
    last_dim_strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    assert torch.equal(torch.ops.dilated.gather(last_dim_strided, 16, 4), expected)


def test_pieces_of_a_split_sequence_hold_what_the_whole_holds(device: str) -> None:
    # What a ring relies on: shards gathered with their start, adding back to the rows of the
    # branch.
    x = rows(100, torch.float32, device)
    w, r = 32, 4
    whole = torch.ops.dilated.scatter_add(
        torch.zeros_like(x), torch.ops.dilated.gather(x, w, r), w, r
    )
    parts = []
    for begin, end in [(0, 30), (30, 31), (31, 77), (77, 100)]:
        shard = x[:, begin:end]
        packed = torch.ops.dilated.gather(shard, w, r, start=begin)
        zeros = torch.zeros_like(shard)
        parts.append(torch.ops.dilated.scatter_add(zeros, packed, w, r, start=begin))
    assert torch.equal(torch.cat(parts, dim=1), whole)
    position = torch.arange(100, device=device) % w % r
    on = position[:, None] == torch.arange(5, device=device) % r
    assert torch.equal(whole, x * on[None, :, :, None])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_in_place_forms_write_what_they_are_given_and_nothing_else(
    case: tuple[int, int, int, int], accumulate: bool, device: str
) -> None:
    length, w, r, start = case
    offsets = [-1, 0, r - 1, r // 2, 0]
    keywords = {"head_offsets": torch.tensor(offsets), "start": start}
    slots = [slot_positions(length, w, r, start, offset) for offset in offsets]
    for dtype in DTYPES[device]:
        x = rows(length, dtype, device)
        storage = torch.full((2, len(slots[0]) + 2, 6, 16), torch.nan, dtype=dtype, device=device)
        packed = storage[:, 1:-1, :5, :12]
        torch.ops.dilated.gather_into(packed, x, w, r, **keywords)
        assert torch.equal(packed, torch.ops.dilated.gather(x, w, r, **keywords))
        packed.fill_(torch.nan)
        assert storage.isnan().all(), "rows beside the packed ones were written"

        source = rows(len(slots[0]), dtype, device, seed=1)
        expected = x.clone()
        for head, positions in enumerate(slots):
            for slot, position in enumerate(positions):
                if position >= 0:
                    before = expected[:, position - start, head] if accumulate else 0
                    expected[:, position - start, head] = before + source[:, slot, head]
        torch.ops.dilated.scatter_into(x, source, w, r, accumulate=accumulate, **keywords)
        assert torch.equal(x, expected)


def test_in_place_forms_refuse_gradients_and_count_versions(device: str) -> None:
    x = rows(20, torch.float32, device).requires_grad_()
    packed = torch.empty(2, 8, 5, 12, device=device)
    with pytest.raises(RuntimeError, match="input: must not .*: gather_into .*call gather"):
        torch.ops.dilated.gather_into(packed, x, 10, 3)
    with pytest.raises(RuntimeError, match="rows: must not .*: scatter_into .*call scatter_add"):
        torch.ops.dilated.scatter_into(x, packed, 10, 3)
    assert packed._version == 0
    with torch.no_grad():
        torch.ops.dilated.gather_into(packed, x, 10, 3)
    assert packed._version == 1
    with pytest.raises(ValueError, match="packed: .*contiguous"):
        torch.ops.dilated.gather_into(packed.repeat(1, 1, 1, 2)[..., ::2], x.detach(), 10, 3)


def test_in_place_forms_refuse_elements_that_share_a_place(device: str) -> None:
    x, packed = rows(20, torch.float32, device), torch.zeros(2, 8, 5, 12, device=device)
    with pytest.raises(ValueError, match="packed: must have a place of its own for every element"):
        torch.ops.dilated.gather_into(packed[:, :1].expand_as(packed), x, 10, 3)
    with pytest.raises(ValueError, match="must have a place of its own for every element"):
        torch.ops.dilated.scatter_into(x[:, :1].expand_as(x), packed, 10, 3, accumulate=True)
