"""Batches of several lengths: padded, packed and nested, against one call a sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dilated_attention_pytorch import (
    DilatedAttention,
    RingDilatedAttentionV2,
    dilated_attention,
    dilated_attention_varlen,
    seq_lens_of_mask,
)
from tests.conftest import Exact, make_qkv
from tests.one_by_one import gradients_one_by_one, one_by_one, poisoned

BRANCHES = ([16, 64], [1, 4])
SEQ_LEN = 90
LENGTHS = [90, 1, 0, 37, 64]
LEFT = [(0, 90), (89, 1), (90, 0), (53, 37), (11, 64)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "scale": 0.3},
    {"padding": "zeros", "head_offsets": "blocked"},
    {"head_offsets": [[0, 0, 0, -1], [3, 2, 1, 0]]},
]


def flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def places(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of a padded batch's sequences in its rows, one behind the other."""
    return [(row * SEQ_LEN + first, length) for row, (first, length) in enumerate(pairs)]


def make_batch(device: str, exact: Exact, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(
        SEQ_LEN, batch=len(LENGTHS), kv_heads=kv_heads, dtype=exact.dtype, device=device
    )


def random_like(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


@pytest.mark.parametrize("pairs", [[(0, n) for n in LENGTHS], LEFT], ids=["right", "left"])
@pytest.mark.parametrize("options", OPTIONS)
def test_padding_may_hold_anything(
    pairs: list[tuple[int, int]], options: dict[str, Any], device: str, exact: Exact
) -> None:
    """NaN in the padding of query, key, value and both gradients reaches nothing."""
    where = places(pairs)
    rows = [poisoned(flat(x), where) for x in make_batch(device, exact)]
    leaves = [x.unflatten(0, (-1, SEQ_LEN)).requires_grad_() for x in rows]
    seq_lens = [n for _, n in pairs] if pairs is not LEFT else pairs
    out, lse = dilated_attention(*leaves, *BRANCHES, seq_lens=seq_lens, return_lse=True, **options)
    expected, expected_lse = one_by_one(rows, where, *BRANCHES, **options)
    close = {"rtol": 0, "atol": exact.forward}
    torch.testing.assert_close(flat(out), expected, **close)
    torch.testing.assert_close(lse.transpose(0, 1).flatten(1), expected_lse, **close)

    weights = random_like(out, 1), random_like(lse, 2)
    nan = [poisoned(flat(weights[0]), where), poisoned(flat(weights[1].transpose(1, 2)), where)]
    gradients = torch.autograd.grad(
        (out, lse),
        leaves,
        (nan[0].view(out.shape), nan[1].unflatten(0, out.shape[:2]).transpose(1, 2)),
    )
    given = nan[0], nan[1].t()
    wanted = gradients_one_by_one(rows, given, where, *BRANCHES, **options)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(flat(gradient), right, rtol=0, atol=exact.backward)


@pytest.mark.parametrize("options", OPTIONS)
def test_packed_sequences_know_nothing_of_each_other(
    options: dict[str, Any], device: str, exact: Exact
) -> None:
    offsets = [0, 37, 37, 101, 106, 226, 230]
    where = [(a, b - a) for a, b in zip(offsets, offsets[1:], strict=False)]
    padded = make_qkv(240, kv_heads=2, dtype=exact.dtype, device=device)
    rows = [poisoned(x[0], where) for x in padded]  # padding behind the last sequence
    leaves = [x.clone().requires_grad_() for x in rows]
    out, lse = dilated_attention_varlen(
        *leaves, torch.tensor(offsets), *BRANCHES, return_lse=True, **options
    )
    expected = one_by_one(rows, where, *BRANCHES, **options)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=exact.forward)
    weights = poisoned(random_like(out, 1), where), poisoned(random_like(lse.t(), 2), where).t()
    gradients = torch.autograd.grad((out, lse), leaves, weights)
    wanted = gradients_one_by_one(rows, weights, where, *BRANCHES, **options)
    torch.testing.assert_close(list(gradients), wanted, rtol=0, atol=exact.backward)
    alone = dilated_attention_varlen(*rows, offsets, *BRANCHES, **options)
    assert isinstance(alone, Tensor) and torch.equal(alone, out)


def test_what_is_wrong_in_one_sequence_stays_there(device: str, exact: Exact) -> None:
    offsets = [0, 50, 90, 91, 200]
    good = [x[0] for x in make_qkv(200, kv_heads=2, dtype=exact.dtype, device=device)]
    bad = [poisoned(x, [(0, 50), (90, 110)]) for x in good]
    results = []
    for rows in (good, bad):
        leaves = [x.clone().requires_grad_() for x in rows]
        out, lse = dilated_attention_varlen(*leaves, offsets, *BRANCHES, return_lse=True)
        gradients = torch.autograd.grad((out, lse), leaves, (out.detach(), lse.detach()))
        results.append((out, lse.t(), *gradients))
    for expected, actual in zip(*results, strict=True):
        assert actual[50:90].isnan().any()
        for span in (slice(50), slice(90, None)):
            torch.testing.assert_close(actual[span], expected[span], rtol=0, atol=exact.backward)


def nested(parts: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_nested_in_nested_out(options: dict[str, Any], device: str, exact: Exact) -> None:
    lengths = [5, 90, 1, 33]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    where = list(zip(offsets.tolist(), lengths, strict=False))
    rows = [x[0] for x in make_qkv(129, kv_heads=2, dtype=exact.dtype, device=device)]
    query, key, value = (nested(list(x.split(lengths))) for x in rows)
    out, lse = dilated_attention(query, key, value, *BRANCHES, return_lse=True, **options)
    assert out.layout is torch.jagged and out.shape == query.shape
    expected, expected_lse = one_by_one(rows, where, *BRANCHES, **options)
    torch.testing.assert_close(out.values(), expected, rtol=0, atol=exact.forward)
    for part, right in zip(lse.unbind(), expected_lse.split(lengths, 1), strict=True):
        torch.testing.assert_close(part, right, rtol=0, atol=exact.forward)
    weights = random_like(expected, 1), random_like(expected_lse, 2)
    gradients = torch.autograd.grad(
        (out.values() * weights[0]).sum() + (lse.transpose(1, 2).values() * weights[1].t()).sum(),
        (query, key, value),
    )
    wanted = gradients_one_by_one(rows, weights, where, *BRANCHES, **options)
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.values(), right, rtol=0, atol=exact.backward)


def test_offsets_of_nested_tensors_may_be_int32() -> None:
    rows, offsets = make_qkv(40)[0][0], torch.tensor([0, 7, 40], dtype=torch.int32)
    x = torch.nested.nested_tensor_from_jagged(rows, offsets)
    expected = dilated_attention_varlen(rows, rows, rows, offsets, *BRANCHES)
    assert torch.equal(dilated_attention(x, x, x, *BRANCHES).values(), expected)


def test_nested_tensors_with_holes() -> None:
    pairs = [(2, 30), (0, 90), (50, 7)]
    query, key, value = make_qkv(SEQ_LEN, batch=3)
    first, lengths = (torch.tensor(x) for x in zip(*pairs, strict=True))
    narrowed = [
        torch.nested.narrow(x, 1, first, lengths, layout=torch.jagged) for x in (query, key, value)
    ]
    out = dilated_attention(*narrowed, *BRANCHES)
    expected, _ = one_by_one([flat(x) for x in (query, key, value)], places(pairs), *BRANCHES)
    for part, (place, n) in zip(out.unbind(), places(pairs), strict=True):
        torch.testing.assert_close(part, expected[place : place + n], rtol=0, atol=1e-12)


def test_modules_take_lengths_and_nested_tensors() -> None:
    q, k, v = make_qkv(SEQ_LEN, batch=len(LENGTHS))
    expected = dilated_attention(q, k, v, *BRANCHES, seq_lens=LENGTHS, is_causal=True)
    for module in (DilatedAttention(*BRANCHES), RingDilatedAttentionV2(*BRANCHES)):
        assert torch.equal(module(q, k, v, is_causal=True, seq_lens=LENGTHS), expected)
        parts = [x[b, :n] for x in (q, k, v) for b, n in enumerate(LENGTHS)]
        split = [nested(parts[i * len(LENGTHS) : (i + 1) * len(LENGTHS)]) for i in range(3)]
        out = module(*split, is_causal=True)
        for b, part in enumerate(out.unbind()):
            torch.testing.assert_close(part, expected[b, : LENGTHS[b]], rtol=0, atol=1e-12)


def test_lengths_come_in_every_form(device: str, exact: Exact) -> None:
    inputs = make_batch(device, exact)
    mask = torch.arange(SEQ_LEN)[None] >= torch.tensor(LENGTHS)[:, None]
    expected = dilated_attention(*inputs, *BRANCHES, seq_lens=LENGTHS)
    for given in (
        tuple(LENGTHS),
        [(0, n) for n in LENGTHS],
        torch.tensor(LENGTHS, dtype=torch.int32),
        torch.tensor(LENGTHS, device=device),
        seq_lens_of_mask(mask.to(device)),
    ):
        assert torch.equal(dilated_attention(*inputs, *BRANCHES, seq_lens=given), expected)


def test_dropout_is_the_same_padded_and_packed(device: str, exact: Exact) -> None:
    """It depends on the row of the batch, or the sequence's index, and its own positions."""
    inputs = make_batch(device, exact)
    options: dict[str, Any] = {"dropout_p": 0.4, "is_causal": True}
    kept = torch.cat([torch.arange(p, p + n) for p, n in places([(0, n) for n in LENGTHS])])
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    left = [torch.stack([r.roll(a, 0) for r, (a, _) in zip(x, LEFT, strict=True)]) for x in inputs]
    nested_rows = [nested([r[:n] for r, n in zip(x, LENGTHS, strict=True)]) for x in inputs]
    results = []
    for call in (
        lambda: dilated_attention(*inputs, *BRANCHES, seq_lens=LENGTHS, **options),
        lambda: dilated_attention(*left, *BRANCHES, seq_lens=LEFT, **options),
        lambda: dilated_attention_varlen(
            *(flat(x)[kept.to(device)] for x in inputs), offsets, *BRANCHES, **options
        ),
        lambda: dilated_attention(*nested_rows, *BRANCHES, **options).values(),
        lambda: dilated_attention(*inputs, *BRANCHES, **options),
    ):
        torch.manual_seed(5)
        results.append(call().detach())
    padded, padded_left, packed, unpadded, whole = results
    assert torch.equal(flat(padded)[kept.to(device)], packed) and torch.equal(packed, unpadded)
    for row, other, (a, n) in zip(padded, padded_left, LEFT, strict=True):
        assert torch.equal(row[:n], other[a : a + n])
    assert torch.equal(padded[0], whole[0])


def test_random_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(60):
        batch, seq_len = torch.randint(1, 40, (2,), generator=generator).tolist()
        first = torch.randint(0, seq_len + 1, (batch,), generator=generator)
        length = (torch.rand(batch, generator=generator) * (seq_len + 1 - first)).long()
        pairs = torch.stack([first, length], 1)
        where = [(row * seq_len + a, n) for row, (a, n) in enumerate(pairs.tolist())]
        branches = ([1 + case % 7, 20], [1 + case % 3, 1 + case % 5])
        inputs = make_qkv(seq_len, 2, 4, batch=batch, seed=case)
        options: dict[str, Any] = {
            "is_causal": case % 2 == 0,
            "padding": ["masked", "zeros"][case // 2 % 2],
        }
        rows = [poisoned(flat(x), where) for x in inputs]
        leaves = [x.clone().requires_grad_() for x in rows]
        results = dilated_attention(
            *(x.view(batch, seq_len, 2, 4) for x in leaves),
            *branches,
            seq_lens=pairs,
            return_lse=True,
            **options,
        )
        out, lse = flat(results[0]), results[1].transpose(0, 1).flatten(1)
        expected = one_by_one(rows, where, *branches, **options)
        torch.testing.assert_close((out, lse), expected, rtol=0, atol=1e-12)
        # A row that attends to nothing has an lse of -inf and no gradient of it.
        weights = torch.ones_like(out), torch.zeros_like(lse)
        wanted = gradients_one_by_one(rows, weights, where, *branches, **options)
        actual = list(torch.autograd.grad(out.sum(), leaves))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


def test_a_batch_without_padding_is_a_plain_call() -> None:
    inputs = make_qkv(48, batch=2)
    expected = dilated_attention(*inputs, *BRANCHES, return_lse=True)
    whole = dilated_attention(*inputs, *BRANCHES, return_lse=True, seq_lens=[48, 48])
    assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))


def test_nothing_is_in_a_batch_of_nothing() -> None:
    inputs = make_qkv(48, batch=2, requires_grad=True)
    out, lse = dilated_attention(*inputs, *BRANCHES, return_lse=True, seq_lens=[0, 0])
    assert (out == 0).all() and (lse == -torch.inf).all()
    empty = [x[:0] for x in inputs]
    assert dilated_attention(*empty, *BRANCHES, seq_lens=[]).shape == (0, 48, 4, 16)
    rows = [x[0] for x in inputs]
    assert (dilated_attention_varlen(*rows, [0], *BRANCHES) == 0).all()


def test_layouts_that_no_view_packs() -> None:
    """[batch, heads, seq_len, head_dim], transposed."""
    heads_first = [x.transpose(1, 2).contiguous() for x in make_qkv(SEQ_LEN, batch=5)]
    inputs = [x.transpose(1, 2) for x in heads_first]
    expected = dilated_attention(*(x.contiguous() for x in inputs), *BRANCHES, seq_lens=LENGTHS)
    assert torch.equal(dilated_attention(*inputs, *BRANCHES, seq_lens=LENGTHS), expected)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = make_qkv(8, batch=2)
    long = make_qkv(16, batch=1)[0]
    jagged = nested([torch.zeros(3, 4, 16), torch.zeros(5, 4, 16)])
    other = nested([torch.zeros(5, 4, 16), torch.zeros(3, 4, 16)])
    strided = torch.nested.nested_tensor([torch.zeros(3, 4, 16)], layout=torch.strided)
    for inputs, seq_lens, error, message in (
        ((q, k, v), [8], ValueError, r"seq_lens must be \[2\] or \[2, 2\].*got shape \(1,\)"),
        ((q, k, v), [8, 9], ValueError, "seq_lens must end at seq_len, 8, or before, got 9"),
        ((q, long, v), [8, 4], ValueError, r"key must have query's batch and seq_len, 2 and 8"),
        ((q, k, long), [8, 4], ValueError, "value must have query's batch and seq_len"),
        ((jagged,) * 3, [3, 5], ValueError, r"seq_lens must be None where query is nested"),
        ((jagged, jagged, v), None, TypeError, "value must be nested where another tensor is"),
        ((q, jagged, jagged), None, TypeError, "query must be nested where another tensor is"),
        ((jagged, other, other), None, ValueError, "key must have query's sequences"),
        ((jagged.transpose(1, 2),) * 3, None, ValueError, r"query must be \[batch, ragged, heads"),
        ((strided,) * 3, None, ValueError, "query must have the layout torch.jagged if nested"),
    ):
        with pytest.raises(error, match=message):
            dilated_attention(*inputs, *BRANCHES, seq_lens=seq_lens)
    with pytest.raises(ValueError, match=r"query must be \[total, heads, head_dim\], got shape"):
        dilated_attention_varlen(q, k, v, [0, 8], *BRANCHES)
    with pytest.raises(TypeError, match="key must be a tensor, got str"):
        dilated_attention_varlen(q[0], "k", v[0], [0, 8], *BRANCHES)
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of rows, 8, or before"):
        dilated_attention_varlen(q[0], k[0], v[0], [0, 9], *BRANCHES)


class Recorder(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_nested", [False, True], ids=["packed", "nested"])
def test_backward_copies_no_gradient(is_nested: bool, device: str, exact: Exact) -> None:
    """Among packed rows and those that the operator takes lie views alone."""
    rows = [flat(x).requires_grad_() for x in make_batch(device, exact)]
    offsets = torch.tensor([0, 90, 91, 91, 128, 192, rows[0].size(0)])
    if is_nested:
        jagged = [torch.nested.nested_tensor_from_jagged(x, offsets.to(device)) for x in rows]
        out = dilated_attention(*jagged, *BRANCHES).values()
    else:
        out = dilated_attention_varlen(*rows, offsets, *BRANCHES)
    with Recorder() as recorder:
        torch.autograd.grad(out, rows, torch.ones_like(out))
    assert "attention_backward" in recorder.names
    assert recorder.names.isdisjoint({"select_backward", "zeros", "new_zeros", "copy_", "clone"})
