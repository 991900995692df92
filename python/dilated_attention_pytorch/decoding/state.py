"""A cache's state as plain values and tensors, which torch.load reads with weights_only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .appended import Appended
from .arguments import integers

if TYPE_CHECKING:
    from .kv_cache import DilatedKVCache


def write_state(cache: DilatedKVCache) -> dict[str, Any]:
    waiting, rows = cache._appended, cache._rows
    return {
        "segment_lengths": cache.scheme.segment_lengths,
        "dilation_rates": cache.scheme.dilation_rates,
        "head_offsets": cache.scheme.offset_table(cache.num_heads),
        "capacity": rows.layout.capacity,
        "lengths": tuple(cache._stored()),
        "key": rows.key,
        "value": rows.value,
        "appended": None if waiting is None else tuple(waiting),
    }


def read_state(cache: DilatedKVCache, state: dict[str, Any]) -> None:
    """All is checked before anything changes."""
    present, rows = write_state(cache), cache._rows
    if not isinstance(state, dict) or state.keys() != present.keys():
        given = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"state must have the entries {sorted(present)}, got {given}")
    fixed = ["segment_lengths", "dilation_rates", "head_offsets"]
    for name in fixed if rows.grows else [*fixed, "capacity"]:
        if state[name] != present[name]:
            raise ValueError(f"state must have {name} {present[name]}, got {state[name]}")
    lengths = integers(state["lengths"], "state['lengths']", 0, None, cache.batch_size)
    layout = rows._make_layout(state["capacity"])
    for name, like in (("key", rows.key), ("value", rows.value)):
        shape = [cache.batch_size, layout.rows, cache.head_dim]
        _check(f"state[{name!r}]", state[name], like, shape)
    waiting = state["appended"]
    if layout.capacity != rows.layout.capacity:
        rows.resize(layout.capacity)
    rows.key.copy_(state["key"])
    rows.value.copy_(state["value"])
    cache._set_lengths(lengths)
    if waiting is not None:
        key, value = (x.to(cache.device, copy=True) for x in waiting[:2])
        cache._appended = Appended(key, value, waiting[2] and tuple(waiting[2]))


def _check(name: str, given: Tensor, like: Tensor, shape: list[int]) -> None:
    if list(given.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got shape {list(given.shape)}")
    if given.dtype != like.dtype:
        wanted_name, given_name = (str(x.dtype).removeprefix("torch.") for x in (like, given))
        raise ValueError(f"{name} must be {wanted_name}, got {given_name}")
