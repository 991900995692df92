"""The operators of libdilated, typed. The only place that names torch.ops.

query is [B, N, H, D]; key and value are [B, N, Hkv, D] with Hkv dividing H. Argument errors are
ValueErrors that the library raises.
"""

from . import fake as _fake  # noqa: F401  (registers)
from . import flops as _flops  # noqa: F401  (registers)
from .attention import attention, attention_backward
from .attention_block import (
    attention_block,
    attention_block_backward,
    attention_block_backward_into,
    attention_block_into,
    make_query_sums,
    round_query_sums,
)
from .decode import decode_append, decode_attend, decode_step
from .gather import gather, gather_into, scatter_add, scatter_into
from .ring_attention import ring_attention
from .segment_attention import segment_attention

__all__ = [
    "attention",
    "attention_backward",
    "attention_block",
    "attention_block_backward",
    "attention_block_backward_into",
    "attention_block_into",
    "decode_append",
    "decode_attend",
    "decode_step",
    "gather",
    "gather_into",
    "ring_attention",
    "make_query_sums",
    "round_query_sums",
    "scatter_add",
    "scatter_into",
    "segment_attention",
]
