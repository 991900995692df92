"""Packed documents, and masks that no dilated attention can keep to."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
)

from dilated_attention_pytorch.integrations.transformers import mask_of
from tests.integrations.transformers.models import IDS, SPARSE, llama, refused, results

LENGTHS = [[40, 1, 42], [83]]  # of each row's documents
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
PACKED = {"position_ids": POSITIONS, "use_cache": False}


def test_packed_documents_are_as_in_full_attention():
    actual, expected = (results(llama(name), **PACKED) for name in ("dilated", "sdpa"))
    torch.testing.assert_close(actual, expected)


def test_packed_documents_are_as_if_alone():
    model = llama("dilated", dilated_attention=SPARSE)
    packed = model(IDS, **PACKED).logits
    for row, lengths in enumerate(LENGTHS):
        documents = zip(IDS[row].split(lengths), packed[row].split(lengths), strict=True)
        for ids, logits in documents:
            torch.testing.assert_close(model(ids[None]).logits[0], logits)


def test_positions_of_one_row_serve_all():
    model = llama("dilated", dilated_attention=SPARSE)
    one, both = (
        model(IDS, position_ids=x, use_cache=False).logits
        for x in (POSITIONS[:1], POSITIONS[:1].expand(2, -1))
    )
    torch.testing.assert_close(one, both)


def test_offsets_of_flash_attention_may_come_with_positions():
    model, offsets = llama("dilated"), torch.tensor([0, 40, 41, 83, 166], dtype=torch.int32)
    names = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    torch.testing.assert_close(
        model(IDS, **PACKED, **names).logits, model(IDS, **PACKED).logits, rtol=0, atol=0
    )
    refused("cu_seq_lens_q must be None", model, **names)


def test_documents_of_a_causal_mask_without_positions_are_found():
    """The form of releases before 5.23, whichever is installed."""
    documents = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]]))
    offsets = mask_of(1, 5, 5, mask_function=and_masks(causal_mask_function, documents))
    assert offsets is not None and offsets.flatten().tolist() == [0, 2, 5]
    for others in ([bidirectional_mask_function], [documents], [causal_mask_function] * 2):
        with pytest.raises(ValueError, match="must be causal or none .* got and_masks"):
            mask_of(1, 5, 5, mask_function=and_masks(*others, documents))


def test_masks_of_ones_own_are_refused():
    def odd(batch, head, query, key):
        return key % 2 == 0

    with pytest.raises(ValueError, match="must be causal or none .* got .*odd"):
        mask_of(1, 5, 5, mask_function=odd)


def test_a_mask_that_leaves_the_cache_out_is_refused():
    short = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 13\], .* got shape"):
        mask_of(2, 3, 13, q_offset=10, attention_mask=short)
