"""Dilated attention over a sequence that is sharded over the ranks of a process group.

Importing it registers the kernels of torch.ops.dilated.ring_attention.
"""

from . import flops as _flops  # noqa: F401  (registers)
from . import kernels
from .group.communicator import traffic
from .group.process_group import Group, group_size
from .group.shards import is_sharded, shards_of
from .group.state import Traffic
from .plans.choose_strategy import Strategy
from .plans.layout import ShardLayout
from .rows import shard, shard_positions, unshard
from .sharding import Sharding
from .telling import telling

__all__ = [
    "Group",
    "ShardLayout",
    "Sharding",
    "Strategy",
    "Traffic",
    "group_size",
    "is_sharded",
    "kernels",
    "shard",
    "shard_positions",
    "shards_of",
    "telling",
    "traffic",
    "unshard",
]
