"""A batch of sequences, packed in rows: in one call, one call each, and padded to the longest."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dilated_attention_pytorch import dilated_attention, dilated_attention_varlen

from ..workloads import Workload
from .calls import Calls, Inputs, UnsupportedError, autograd_calls


def packed(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """This library's one call."""
    options = {**workload.arguments, "is_causal": causal}
    offsets = torch.tensor([0, *(end for _, end in workload.stretches)])

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (query.squeeze(0), key.squeeze(0), value.squeeze(0))
        return cast(Tensor, dilated_attention_varlen(*rows, offsets, **options))[None]

    return autograd_calls(function, inputs)


def one_by_one(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """A call for each sequence, and their results together."""
    options = _options(workload, causal)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [
            cast(Tensor, dilated_attention(query[:, i:j], key[:, i:j], value[:, i:j], **options))
            for i, j in workload.stretches
        ]
        return torch.cat(parts, 1)

    return autograd_calls(function, inputs)


def padded(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """All of [sequences, longest, ...] is computed, padding too; filling it is not timed."""
    options = _options(workload, causal)

    def pad(rows: Tensor) -> Tensor:
        return pad_sequence([rows[0, i:j] for i, j in workload.stretches], batch_first=True)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cast(Tensor, dilated_attention(query, key, value, **options))

    return autograd_calls(function, Inputs(*map(pad, inputs.all)))


def _options(workload: Workload, causal: bool) -> dict[str, Any]:
    if not workload.lengths:
        raise UnsupportedError("there is one sequence")
    return {**workload.arguments, "is_causal": causal}
