"""A cache's state as plain values and tensors, which torch.load reads with weights_only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..pattern.bounds import at_least, check_bounds
from ..pattern.plain import check_plain
from .appended import Appended
from .arguments import check_rows, integers

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
    capacity = at_least(0, state["capacity"], "state['capacity']")
    most = capacity if rows.grows else cache.max_seq_len
    end = None if most is None else most + 1
    lengths = integers(state["lengths"], "state['lengths']", 0, end, cache.batch_size)
    layout = rows._make_layout(capacity)
    for name, like in (("key", rows.key), ("value", rows.value)):
        shape = [cache.batch_size, layout.rows, cache.head_dim]
        _check(f"state[{name!r}]", state[name], like, shape)
    waiting = _read_appended(cache, state["appended"])
    if waiting is not None and cache.max_seq_len is not None:
        after = max(waiting.lengths_after(lengths))
        together = "state['lengths'] and ['appended'] together"
        check_bounds(0, after, together, cache.max_seq_len + 1)
    if layout.capacity != rows.layout.capacity:
        rows.resize(layout.capacity)
    rows.key.copy_(state["key"])
    rows.value.copy_(state["value"])
    cache._set_lengths(lengths)
    cache._appended = waiting


def _read_appended(cache: DilatedKVCache, given: Any) -> Appended | None:
    """A copy, on the cache's device."""
    if given is None:
        return None
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise ValueError(f"state['appended'] must be None or key, value and counts, got {given!r}")
    rows: list[Tensor] = []
    for place, tensor in enumerate(given[:2]):
        name = f"state['appended'][{place}]"
        check_plain(tensor, name)
        n = rows[0].shape[1] if rows else None
        rows.append(tensor.to(cache.device, copy=True))
        check_rows(rows[-1], name, cache.batch_size, cache.num_kv_heads, cache._like, n)
    key, value = rows
    counts, end = given[2], key.shape[1] + 1
    if counts is not None:
        counts = integers(counts, "state['appended'][2]", 0, end, cache.batch_size)
    return Appended(key, value, counts)


def _check(name: str, given: Any, like: Tensor, shape: list[int]) -> None:
    check_plain(given, name)
    if list(given.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got shape {list(given.shape)}")
    if given.dtype != like.dtype:
        wanted_name, given_name = (str(x.dtype).removeprefix("torch.") for x in (like, given))
        raise ValueError(f"{name} must be {wanted_name}, got {given_name}")
