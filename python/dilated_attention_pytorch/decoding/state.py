"""A cache's state as plain values and tensors, which torch.load reads with weights_only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .appended import Appended
from .arguments import integers

if TYPE_CHECKING:
    from .kv_cache import DilatedKVCache


def write_state(cache: DilatedKVCache) -> dict[str, Any]:
    waiting = cache._appended
    return {
        "segment_lengths": cache.scheme.segment_lengths,
        "dilation_rates": cache.scheme.dilation_rates,
        "head_offsets": cache.scheme.offset_table(cache.num_heads),
        "lengths": tuple(cache._stored),
        "keys": [branch.key for branch in cache._branches],
        "values": [branch.value for branch in cache._branches],
        "appended": None if waiting is None else tuple(waiting),
    }


def read_state(cache: DilatedKVCache, state: dict[str, Any]) -> None:
    """All is checked before anything changes."""
    present = write_state(cache)
    if not isinstance(state, dict) or state.keys() != present.keys():
        given = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must have the entries {sorted(present)}, got {given}")
    for name in ("segment_lengths", "dilation_rates", "head_offsets"):
        if state[name] != present[name]:
            raise ValueError(f"state must have {name} {present[name]}, got {state[name]}")
    lengths = integers(state["lengths"], "state['lengths']", 0, None, cache.batch_size)
    for name in ("keys", "values"):
        for branch, given in zip(cache._branches, state[name], strict=True):
            longest = max(length % branch.layout.segment_length for length in lengths)
            _check(f"state[{name!r}]", given, branch.key, branch.layout.rows(longest))
    waiting = state["appended"]
    cache._stored, cache._appended = list(lengths), None
    for branch, key, value in zip(cache._branches, state["keys"], state["values"], strict=True):
        branch.key, branch.value = (x.to(cache.device, copy=True) for x in (key, value))
    if waiting is not None:
        key, value = (x.to(cache.device, copy=True) for x in waiting[:2])
        cache._appended = Appended(key, value, tuple(waiting[2]))


def _check(name: str, given: Tensor, present: Tensor, rows: int) -> None:
    """Buffers may have more or fewer rows than ours, where they grow, but all that are in use."""
    shape, wanted = list(given.shape), list(present.shape)
    if shape[:2] + shape[3:] != wanted[:2] + wanted[3:] or given.shape[2] < rows:
        raise ValueError(f"{name} must be {wanted}, got shape {shape}")
    if given.dtype != present.dtype:
        wanted_name, given_name = (str(x.dtype).removeprefix("torch.") for x in (present, given))
        raise ValueError(f"{name} must be {wanted_name}, got {given_name}")
