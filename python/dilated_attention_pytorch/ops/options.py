"""The keyword options of the attention operators. Schemas hold the defaults."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from typing_extensions import TypedDict


class Options(TypedDict, total=False):
    """The options of all attention operators, in the schemas' order.

    Attributes:
        head_offsets: int64 [branches, H] on the CPU, None for h mod r.
        is_causal: also require key position <= query position.
        scale: finite in float32 (float64 for float64); None for 1 / sqrt(D).
        padding: "masked" or "zeros".
        dropout_p: probability of dropping a weight, at least 0 and below 1.
        dropout_seed: int64 [1] on query's device, needed if dropout_p > 0.
        sequences: int64 [sequences, 2] on the CPU, of (first row, length), ascending and without
            overlap. query, key and value are then [1, rows, heads, D], and each sequence is as if
            called alone, with the dropout of the batch entry of its index. Rows between them may
            hold anything, NaN included, also in gradients; they get out 0, lse -inf and gradients
            0 (attention_block_into leaves them as they are). Rows, and positions of blocks, are
            those of the whole batch; in a ring shard_lengths may be those of several sequences one
            behind another.
    """

    head_offsets: Tensor | None
    is_causal: bool
    scale: float | None
    padding: Literal["masked", "zeros"]
    dropout_p: float
    dropout_seed: Tensor | None
    sequences: Tensor | None


class PatternOptions(Options, total=False):
    """The options of operators that run on one device: those of `Options`, and one more.

    Attributes:
        pattern: int32 on query's device, from the planner; without one the operator plans by
            itself.
    """

    pattern: Tensor | None
