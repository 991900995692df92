"""A process group's name, size, timeout and store."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

if dist.is_available():
    # Before any group exists: defaults of its functions keep alive the group that exists at import,
    # and gloo's threads may then abort at exit. A profiler or a compiler would import it later.
    import torch.distributed.nn
    from torch.distributed.device_mesh import DeviceMesh

from .store import Store, reaching_the_store

Group = object  # dist.ProcessGroup, DeviceMesh or a group's name; a torch without them has no types

# Not typed, as names that begin with _ are not exported; 2.11 to 2.15 have them.
_c10d: Any = getattr(dist, "distributed_c10d", None)


def resolve(group_name: str) -> dist.ProcessGroup:
    """This process's group of the name.

    Raises RuntimeError if there is none, or no torch.distributed.
    """
    if not dist.is_available():
        raise RuntimeError("a group needs torch.distributed, which this torch was built without")
    try:
        group: dist.ProcessGroup = _c10d._resolve_process_group(group_name)
        return group
    except RuntimeError as error:
        raise RuntimeError(
            f"group must be a process group of this process, got the name {group_name!r}, which is "
            "none (destroyed, or made in another process)"
        ) from error


def group_name(group: Group) -> str:
    """The name of a ProcessGroup or of a one-dimensional DeviceMesh; a name stays as it is.

    Raises:
        TypeError: neither of them.
        ValueError: a mesh of more dimensions, or a group that this rank is not in.
    """
    if isinstance(group, str):
        return group
    if dist.is_available():
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    "group must be a DeviceMesh of one dimension (take one: mesh['name']), got "
                    f"{group.ndim}"
                )
            return str(group.get_group().group_name)
        if isinstance(group, dist.ProcessGroup):
            return str(group.group_name)
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this rank is a member of, got another")
    raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or a group's name, got {group!r}")


def store_of(group: dist.ProcessGroup, rank: int) -> Store:
    """The group's store, with a prefix that earlier groups of the same name did not have.

    torchrun's store outlives groups, and a group that is made again finds the keys of the destroyed
    one. The prefix is the number of groups of this name that the rank has used.
    """
    store = _c10d._get_process_group_store(group)
    with reaching_the_store():
        made = store.add(f"dilated/groups of rank {rank}", 1)
    prefixed: Store = _c10d.PrefixStore(str(made), store)
    return prefixed


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's operations may take."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return timedelta(minutes=30)  # torch.distributed's own default


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def group_size(name: str) -> int:
    """How many ranks the group has."""
    return int(resolve(name).size())


def gather_rows(x: torch.Tensor, counts: Sequence[int], name: str) -> list[torch.Tensor]:
    """Every rank's x, without gradients. counts: the length of each one's first dimension."""
    group = resolve(name)
    most = max(counts, default=0)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def rank_in(name: str) -> int:
    """This process's rank in the group."""
    return int(resolve(name).rank())
