"""Dilated attention over a sequence that is sharded over the ranks of a process group.

Importing it registers the kernels of torch.ops.dilated.ring_attention.
"""

from . import operator
from .exchange import Group, group_size, traffic
from .group_state import Traffic
from .sharding import Sharding
from .strategy import Strategy
from .telling import telling

__all__ = [
    "Group",
    "Sharding",
    "Strategy",
    "Traffic",
    "group_size",
    "operator",
    "telling",
    "traffic",
]
