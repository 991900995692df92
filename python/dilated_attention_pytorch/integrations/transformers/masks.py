"""What a model's mask says, once a forward: the tokens of each row, packed documents, a window.

A mask goes through the model unread, but as a tensor of four dimensions, for what transformers
passes through its own functions twice. Ours are int64, on the CPU:

    [batch, 1, 1, 2]           the first token of each row, and how many there are
    [batch, 1, 1, 3]           the same, and how many positions a cache held before the queries
    [1, 1, documents + 1, 1]   where documents begin, in the batch's rows one behind the other
    [1, 1, 0, size]            a sliding window, which an error names where a layer attends by it
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from ...ragged import seq_lens_of_mask


class Rows(NamedTuple):
    """stretches: [batch, 2]; begin: positions in the cache."""

    stretches: Tensor
    begin: int


class Documents(NamedTuple):
    cu_seqlens: Tensor  # [documents + 1]


def read(mask: Any) -> Rows | Documents | None:
    """A mask of `mask_of`; raises ValueError for windows, and for what is none of its masks."""
    if mask is None:
        return None
    shape = tuple(mask.shape) if isinstance(mask, Tensor) and mask.dtype == torch.int64 else ()
    if len(shape) == 4 and shape[1] == 1:
        if shape[0] == 1 and shape[2] == 0:
            raise ValueError(
                f"sliding_window must be None with dilated attention, got a window of {shape[3]}"
            )
        if shape[0] == 1 and shape[3] == 1:
            return Documents(mask.flatten())
        if shape[2] == 1 and shape[3] in (2, 3):
            return Rows(mask[:, 0, 0, :2], int(mask[0, 0, 0, 2]) if shape[3] == 3 else 0)
    shown = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
    raise ValueError(
        f"attention_mask must be [batch, seq_len] or None with dilated attention, got {shown}"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor | None:
    """What a model calls for the mask that its layers get; None where each row is its queries.

    The host waits for a mask, for packed position_ids and for the length of a static cache that
    are on a GPU.

    Raises ValueError for padding masks with holes or too short, and for masks of a model's own.
    """
    if local_size is not None:
        return torch.empty(1, 1, 0, local_size, dtype=torch.int64, device="cpu")
    begin = int(q_offset)
    if (documents := _documents(mask_function)) is not None:
        return _cut(documents, batch_size)
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "the model's mask must be causal or none with dilated attention, without windows and "
            f"masks of its own, got {mask_function.__qualname__}"
        )
    end = begin + q_length
    if attention_mask is None:
        pairs = torch.tensor([[0, end]] * batch_size, dtype=torch.int64, device="cpu")
    elif attention_mask.shape[-1] < end:
        raise ValueError(
            f"attention_mask must be [batch, {end}], the positions in the cache included, with "
            f"dilated attention, got shape {tuple(attention_mask.shape)}"
        )
    else:
        pairs = seq_lens_of_mask(~attention_mask[:, :end])
    if begin > 0:
        pairs = torch.cat([pairs, torch.full_like(pairs[:, :1], begin)], 1)
    elif kv_length == q_length and bool((pairs[:, 1] == q_length).all()):
        return None
    return pairs[:, None, None]


def _documents(mask_function: Any) -> Tensor | None:
    """The document of each token, [batch, seq_len], of a causal mask for packed position_ids.

    transformers builds it of two functions: one that compares the documents, and the causal one,
    which from release 5.23 on gets positions in the document.
    """
    parts = [_unmapped(part) for part in _closure(mask_function).get("mask_functions", ())]
    same = [part for part in parts if _made_by("packed_sequence_mask_function", part)]
    if len(parts) != 2 or len(same) != 1 or causal_mask_function not in parts:
        return None
    documents: Tensor = _closure(same[0])["packed_sequence_mask"]
    return documents


def _unmapped(function: Any) -> Any:
    remapped = _made_by("remap_positions_for_packed_sequence", function)
    return _closure(function)["mask_function"] if remapped else function


def _made_by(name: str, function: Any) -> bool:
    return str(function.__qualname__).startswith(f"{name}.")


def _closure(function: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)


def _cut(documents: Tensor, batch_size: int) -> Tensor | None:
    """Where each begins; None where each is a row."""
    documents = documents.expand(batch_size, -1).cpu()
    if not documents.any():
        return None
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents.diff() != 0
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([documents.numel()])])[None, None, :, None]
