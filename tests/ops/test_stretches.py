"""Rows whose places in their tensors are not their positions, and rows that see only part of their
tile's columns: what the words can say beyond a block of a sequence.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Exact, make_qkv
from tests.ops.calls import (
    Result,
    Tensors,
    assert_close,
    deterministic_mode,
    differentiate,
    output_gradients,
)
from tests.planning import Spec, plan_words, seal, with_windows
from tests.reference import dropout_keep, reference_attention

HEADS, KV_HEADS = 6, 3
# Of a sequence of 230 positions: of a zigzag's ranks, of unequal shards, in pieces.
STRETCHES = {
    "zigzag": ((0, 58), (174, 230)),
    "inner": ((58, 116), (116, 174)),
    "unequal": ((3, 10), (64, 140), (141, 142), (200, 230)),
    "one": ((40, 130),),
    "whole": ((0, -1),),
}


def run(
    tensors: Tensors,
    spec: Spec,
    words: np.ndarray,
    positions: tuple[Tensor, Tensor],
    **options: Any,
) -> Result:
    """attention_block and its gradients, by these words whatever they are of."""
    call = Spec(
        spec.seq_len,
        spec.segment_lengths,
        spec.dilation_rates,
        HEADS,
        KV_HEADS,
        is_causal=spec.is_causal,
        queries=((0, len(positions[0])),),
        keys=((0, len(positions[1])),),
    )
    pattern = torch.from_numpy(seal(words, fingerprint_of=plan_words(call))).to(tensors[0].device)
    block = (spec.seq_len, 0, 0, spec.segment_lengths, spec.dilation_rates)
    options |= {"pattern": pattern, "is_causal": spec.is_causal}
    out, lse = torch.ops.dilated.attention_block(*tensors, *block, **options)
    backward = torch.ops.dilated.attention_block_backward
    gradients = backward(*output_gradients(tensors[0]), *tensors, out, lse, *block, **options)
    return Result(out, lse, *gradients)


def expect(
    tensors: Tensors,
    spec: Spec,
    positions: tuple[Tensor, Tensor],
    dropout_seed: Tensor | None = None,
    **options: Any,
) -> Result:
    inputs = [x.detach().to("cpu", torch.float64).requires_grad_() for x in tensors]
    if dropout_seed is not None:
        batch = inputs[0].shape[0]
        probability = options["dropout_p"]
        options["keep"] = dropout_keep(int(dropout_seed), probability, batch, HEADS, *positions)
    outputs = reference_attention(
        *inputs,
        spec.segment_lengths,
        spec.dilation_rates,
        is_causal=spec.is_causal,
        seq_len=spec.seq_len,
        positions=positions,
        **options,
    )
    grad_out, grad_lse = (x.cpu() for x in output_gradients(tensors[0]))
    return differentiate(outputs, inputs, (grad_out, grad_lse))


def rows_of(exact: Exact, device: str, head_dim: int, positions: tuple[Tensor, Tensor]) -> Tensors:
    """Normal rows of a batch of two at these positions."""
    options: dict[str, Any] = {"dtype": exact.dtype, "device": device, "kv_heads": KV_HEADS}
    query, key, value = make_qkv(230, HEADS, head_dim, batch=2, **options)
    queries, keys = (p.to(device) for p in positions)
    return query[:, queries], key[:, keys], value[:, keys]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", STRETCHES)
@pytest.mark.parametrize("queries", ["zigzag", "unequal", "whole"])
def test_rows_lie_in_stretches_of_the_sequence(
    queries: str, keys: str, is_causal: bool, dropout_p: float, device: str, exact: Exact
) -> None:
    rng = random.Random(f"{queries} {keys} {is_causal} {dropout_p}")
    spec = Spec(
        230,
        [rng.randint(20, 300) for _ in range(3)],
        [rng.choice([1, 2, 3, 5]) for _ in range(3)],
        HEADS,
        KV_HEADS,
        is_causal=is_causal,
        queries=STRETCHES[queries],
        keys=STRETCHES[keys],
    )
    positions = (
        torch.from_numpy(spec.positions(spec.queries)),
        torch.from_numpy(spec.positions(spec.keys)),
    )
    tensors = rows_of(exact, device, rng.choice([16, 64, 128]), positions)
    options: dict[str, Any] = {}
    if dropout_p > 0:
        options = {"dropout_p": dropout_p, "dropout_seed": torch.tensor(7, device=device)}
    expected = expect(tensors, spec, positions, **options)
    for is_deterministic in (False, True):
        with deterministic_mode(is_deterministic):
            actual = run(tensors, spec, plan_words(spec), positions, **options)
        assert_close(actual, expected, exact)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [(-9, 4), (-60, 0), (0, 0), (3, 40), (-300, 300)])
@pytest.mark.parametrize("head_dim", [48, 64, 128, 200])
def test_a_row_sees_its_window(
    head_dim: int, window: tuple[int, int], is_causal: bool, device: str, exact: Exact
) -> None:
    spec = Spec(230, [50, 90, 230], [1, 3, 2], HEADS, KV_HEADS, is_causal=is_causal)
    everything = torch.arange(230)
    positions = (everything, everything)
    tensors = rows_of(exact, device, head_dim, positions)
    first, last = window
    words = with_windows(plan_words(spec), window, (-last, -first))
    distance = everything[None] - everything[:, None]
    visible = (first <= distance) & (distance <= last)
    expected = expect(tensors, spec, positions, visible=visible)
    for is_deterministic in (False, True):
        with deterministic_mode(is_deterministic):
            actual = run(tensors, spec, words, positions)
        assert_close(actual, expected, exact)
