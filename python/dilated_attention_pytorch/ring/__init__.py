"""Dilated attention over a sequence that is sharded over the ranks of a process group.

Importing it registers the kernels of torch.ops.dilated.ring_attention.
"""

from .exchange import Group, Traffic, group_name, group_size, traffic
from .operator import check_shard_lengths
from .strategy import STRATEGIES, Strategy, check_strategy

__all__ = [
    "STRATEGIES",
    "Group",
    "Strategy",
    "Traffic",
    "check_shard_lengths",
    "check_strategy",
    "group_name",
    "group_size",
    "traffic",
]
