"""What a rank refuses before it reaches the ring's operator is told to the other ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .group.communicator import Communicator
from .group.process_group import Group, group_name
from .sharding import Sharding

_NOBODY = nullcontext()  # made once: every call on one device enters it


def telling(group: Group | Sharding | None) -> AbstractContextManager[None]:
    """Around a call over the group: if it raises, the other ranks' call raises too.

    An error of the operator itself is left alone, as the other ranks know of it, and so is one
    while a compiler traces.
    """
    if group is None or torch.compiler.is_compiling():
        return _NOBODY
    try:
        name = group.group_name if isinstance(group, Sharding) else group_name(group)
        return Communicator(name).refusing()
    except Exception:  # no such group: the call itself says so
        return _NOBODY
