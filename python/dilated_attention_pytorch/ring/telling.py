"""Tells the other ranks if this one raises before it reaches the ring's operator."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from .group.communicator import Communicator
from .group.process_group import Group, group_name
from .sharding import Sharding

_NOBODY = nullcontext()  # made once: every call on one device enters it


def telling(group: Group | Sharding | None) -> AbstractContextManager[None]:
    """A context around a call over the group: if it raises, the other ranks' call raises too.

    Not for errors of the operator itself, which the other ranks know of, nor while a compiler
    traces.
    """
    if group is None or torch.compiler.is_compiling():
        return _NOBODY
    try:
        name = group.group_name if isinstance(group, Sharding) else group_name(group)
        return Communicator(name).refusing()
    except Exception:  # no such group: the call itself says so
        return _NOBODY
