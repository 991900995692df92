"""Peers that claim to compute the same thing do, also where they are put together here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from benchmarks.ops import relative_error
from benchmarks.peers import batches, sdpa, views
from benchmarks.peers.calls import Calls, Inputs, UnsupportedError
from benchmarks.peers.flex import ClassOrder, block_mask, flex, multiplicities
from benchmarks.peers.views import make_pieces
from benchmarks.workloads import WORKLOADS, Workload

SMALL = Workload("small", "test", 96, 6, 16, (16, 48), (1, 4), batch=2)
FLEX = Workload("flex", "test", 1024, 3, 16, (256, 1024), (1, 2))
# Rounding of float32 on the CPU, of bfloat16 on a GPU.
TOLERANCE = {"cpu": 1e-5, "cuda": 2e-2}


def make_inputs(workload: Workload, device: str) -> tuple[Inputs, float]:
    return Inputs.make(workload, torch.device(device)), TOLERANCE[device]


def assert_same(got: Calls, expected: Calls, tolerance: float) -> None:
    assert relative_error(got.restore(got.forward()), expected.forward()) < tolerance
    assert got.both is not None and got.backward is not None and expected.both is not None
    for grads in (got.both(), got.backward(), got.backward()):
        for one, other in zip(grads, expected.both(), strict=True):
            assert relative_error(got.restore(one), other) < 2 * tolerance


@pytest.mark.parametrize("rule", ["blocked", "interleaved"])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_views_equals_ours(rule: str, head_dim: int, causal: bool, device: str) -> None:
    workload = replace(SMALL, head_offsets=rule, head_dim=head_dim)
    if device == "cuda":  # cuDNN wants longer rows
        workload = replace(workload, seq_len=1536, segment_lengths=(256, 768))
    inputs, tolerance = make_inputs(workload, device)
    ours = peers.ours(workload, causal, inputs)
    assert_same(views.SdpaViews()(workload, causal, inputs), ours, tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_in_one_call_equals_a_call_for_each_sequence(causal: bool, device: str) -> None:
    batch = WORKLOADS["cpu-packed"]
    inputs, tolerance = make_inputs(batch, device)
    ours = peers.ours(batch, causal, inputs)
    assert_same(batches.one_by_one(batch, causal, inputs), ours, tolerance)


def test_a_padded_batch_computes_all_of_the_longest() -> None:
    batch = WORKLOADS["cpu-packed"]
    inputs, _ = make_inputs(batch, "cpu")
    out = batches.padded(batch, False, inputs).forward()
    assert out.shape == (len(batch.lengths), max(batch.lengths), batch.heads, batch.head_dim)
    for padded_or_each in (batches.padded, batches.one_by_one):
        with pytest.raises(UnsupportedError, match="there is one sequence"):
            padded_or_each(SMALL, False, inputs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_equals_ours(causal: bool) -> None:
    # On the CPU FlexAttention runs uncompiled: the mask, the bias and the order are what is tested.
    inputs, tolerance = make_inputs(FLEX, "cpu")
    calls, wanted = flex(FLEX, causal, inputs), peers.ours(FLEX, causal, inputs).forward()
    assert relative_error(calls.restore(calls.forward()), wanted) < tolerance


def test_flex_computes_no_block_that_holds_nothing() -> None:
    order = ClassOrder.make(FLEX)
    count = multiplicities(FLEX, order, torch.device("cpu"))
    pairs = int((count.long() > 0).sum()) * 128 * 128
    nominal = int(count.long().sum()) * 128 * 128
    assert nominal == sum(
        3 * (1024 // r) * (w // r) for w, r in zip((256, 1024), (1, 2), strict=True)
    )
    mask = block_mask(count, order, causal=False)
    assert mask.full_kv_num_blocks is not None
    held = int(mask.full_kv_num_blocks.sum() + mask.kv_num_blocks.sum()) * 128 * 128
    assert held == pairs < nominal


@pytest.mark.parametrize(
    ("change", "make"),
    [
        ({"seq_len": 97}, views.SdpaViews()),
        ({"dilation_rates": (1, 5)}, views.library_bound),
        ({"kv_heads": 2}, views.SdpaViews()),
        ({"kv_heads": 2}, peers.full_attention),
        ({}, flex),
    ],
)
def test_what_a_peer_cannot_do_it_says(
    change: dict[str, object], make: Callable[[Workload, bool, Inputs], Calls]
) -> None:
    workload = replace(SMALL, **change)  # type: ignore[arg-type]
    inputs, _ = make_inputs(workload, "cpu")
    with pytest.raises(UnsupportedError):
        make(workload, False, inputs)
    with pytest.raises(UnsupportedError, match="do not divide 10001"):
        make_pieces(WORKLOADS["gigapath-10k"])


def test_library_attention_returns_the_log_sum_exp() -> None:
    query, key, value = (torch.randn(2, 32, 3, 16, requires_grad=True) for _ in range(3))
    done = sdpa.forward((query, key, value), False, "cudnn")
    scores = torch.einsum("bshd,bthd->bhst", query, key) / math.sqrt(16)
    torch.testing.assert_close(done.lse, scores.logsumexp(-1))
    expected = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), value)
    torch.testing.assert_close(done.out, expected)
    assert not done.lse.requires_grad
    for one, other in zip(
        torch.autograd.grad(done.out.square().sum(), (query, key, value)),
        torch.autograd.grad(expected.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_torchscale_wants_a_checkout() -> None:
    inputs, _ = make_inputs(SMALL, "cpu")
    with pytest.raises(UnsupportedError, match="--torchscale"):
        peers.make_impls(None)["torchscale"].prepare(SMALL, False, inputs)
    with pytest.raises(ValueError, match="torchscale must be a checkout .* got nowhere"):
        peers.make_impls(Path("nowhere"))
