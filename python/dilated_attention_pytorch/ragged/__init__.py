"""Sequences of several lengths in one call: lists, offsets, masks, nested tensors become one form.

The operators take rows [1, T, H, D] and `sequences`, int64 [S, 2] on the CPU: the place of each
sequence's first row and its length, one sequence behind the other; what lies between is padding.
Values are looked at here, so that errors name what the caller gave. While a compiler traces there
are none, and the operator refuses what doesn't fit when it runs.
"""

from .lengths import SeqLens, layout_of, of_offsets, stretches
from .mask import Mask, as_mask, kept_rows, seq_lens_of_mask
from .packed import Packed, pack
from .recall import Table

__all__ = [
    "Mask",
    "Packed",
    "SeqLens",
    "Table",
    "as_mask",
    "kept_rows",
    "layout_of",
    "of_offsets",
    "pack",
    "seq_lens_of_mask",
    "stretches",
]
