"""What a rank refuses before it reaches the ring's operator is told to the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from .exchange import Group, Peers, group_name
from .sharding import Sharding

# Not what else passes through: torch's checkpoints stop a recomputation by an exception.
_REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError)
_NOBODY = nullcontext()  # made once: every call on one device enters it


def telling(group: Group | Sharding | None) -> AbstractContextManager[None]:
    """Around a call over the group: if it raises, the other ranks' call raises too.

    An error of the operator itself is left alone, as the other ranks know of it, and so is one
    while a compiler traces.
    """
    if group is None or torch.compiler.is_compiling():
        return _NOBODY
    return _telling(group)


@contextlib.contextmanager
def _telling(group: Group | Sharding) -> Iterator[None]:
    try:
        peers = Peers(group.group_name if isinstance(group, Sharding) else group_name(group))
    except Exception:  # no such group: the call itself says so
        yield
        return
    calls = peers.calls
    try:
        yield
    except _REFUSALS as error:
        if peers.calls == calls:
            peers.refuse(f"{type(error).__name__}: {error}")
        raise
