"""Dilated attention as a function: its forms for type checkers, and the one way of a call from
arguments to an operator, which modules and `varlen` take as well."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from . import ops
from .ops.transformed import Call, attention_in_transform
from .pattern import (
    BasePatternCache,
    HeadOffsets,
    Padding,
    PatternSpec,
    Scheme,
    Sequences,
    current_pattern_cache,
)
from .pattern.bounds import HEADS_END
from .pattern.dropout import seed_steps
from .pattern.plain import refuse_masked
from .pattern.scalars import is_symbolic, real
from .pattern.transforms import in_transform, is_traced, outside_transforms
from .ragged import SeqLens, Table, pack
from .ring import Group, Sharding, ShardLayout, Strategy, is_sharded, shards_of, telling

CacheArgument = BasePatternCache | Literal[False] | None
_MAX_SEED = 2**63 - 1
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    seq_lens: SeqLens | None = ...,
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> Tensor: ...
@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    seq_lens: SeqLens | None = ...,
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: bool,
    seq_lens: SeqLens | None = ...,
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = "interleaved",
    is_causal: bool = False,
    scale: float | None = None,
    padding: Padding = "masked",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    seq_lens: SeqLens | None = None,
    pattern_cache: CacheArgument = None,
    group: Group | None = None,
    shard_lengths: Sequence[int] | None = None,
    strategy: Strategy = "auto",
    shard_layout: ShardLayout = "contiguous",
) -> Tensor | tuple[Tensor, Tensor]:
    """Dilated attention: LongNet, arXiv 2307.02486, eqs. 3-10, as one softmax.

    In branch (w, r), position p takes part for head h iff (p mod w) mod r is the head's offset, and
    attends to the participants of its own segment p // w. Branches are weighted by their softmax
    denominators (eq. 10), which makes them one softmax over all their keys; a key counts once for
    each branch that holds it. A query that no branch holds gets zeros. Any seq_len, segment length
    and rate will do; nothing has to divide anything.

    Args:
        query: [batch, seq_len, heads, head_dim]; float16, bfloat16, float32, or float64 on the CPU.
            Or a nested tensor of layout torch.jagged, [batch, ragged, heads, head_dim]: each
            sequence has positions, segments and lattices of its own. Or a DTensor that is sharded
            by batch or heads, as key and value then are.
        key, value: [batch, seq_len, kv_heads, head_dim], kv_heads dividing heads; query head h
            reads KV head h // (heads / kv_heads). Nested where query is, with its lengths.
        segment_lengths: w of each branch, in positions; clipped to seq_len.
        dilation_rates: r of each branch.
        head_offsets: "interleaved", h mod r (the paper); "blocked", h // ceil(heads / r)
            (torchscale); or an integer table [branches, heads], -1 where a head is not in the
            branch (see `head_group_offsets`).
        is_causal: also require key position <= query position.
        scale: factor of query . key; 1 / sqrt(head_dim) by default. A number, a NumPy scalar or a
            0-dim tensor, whose value is read at once. Under torch.compile it may be symbolic, as
            may segment_lengths.
        padding: "masked": positions from seq_len on do not exist. "zeros", torchscale's and
            GigaPath's: a non-causal segment that is cut short counts the missing keys as keys of
            score 0 and value 0.
        dropout_p: probability of dropping an attention weight, at every call, as in
            torch.nn.functional.scaled_dot_product_attention; draws from torch's generator.
        return_lse: also return the log-sum-exp, the logarithm of the softmax's denominator.
        seq_lens: [batch], integers: row b is a sequence of its first seq_lens[b] positions, as if
            called alone. Or [batch, 2], the first position and the length of each, for padding
            before it; see `seq_lens_of_mask`. Padding may hold anything, NaN included, and so may
            the gradients of its outputs: its out is 0, its lse -inf, its gradients are 0. A list or
            a tensor, on the CPU; for one on a GPU, as for a nested tensor there, the host waits
            once a call. Under torch.compile give a tensor: one program then serves all lengths.
            With a group they are of the whole sequences, alike on all ranks, and tensors must not
            be nested.
        pattern_cache: the `PatternCache` or `TieredPatternCache` that keeps planned patterns; None
            means `current_pattern_cache()`. With False, and under torch.compile, the operators keep
            what they plan (`pattern.resize_planned_patterns`). Must be None with a group.
        group: a ProcessGroup or one-dimensional DeviceMesh, or a group's name. Its ranks then hold
            the sequence one after another, and query, key and value are this rank's rows. All ranks
            must call with the same arguments, and all or none run the backward.
        shard_lengths: rows of each rank, which may be 0; the same on all ranks by default. With
            "zigzag", of each of its 2P stretches, in the sequence's order.
        strategy: how rows travel: "ring", "gather", "all_to_all", or "auto", which compares the
            bytes that each would move; docs/ring.md.
        shard_layout: "contiguous", or "zigzag", which divides causal work evenly: of 2P stretches
            of the sequence, rank i of P holds stretch i and then stretch 2P - 1 - i.

    Returns:
        out, like query; with return_lse (out, lse), lse being [batch, heads, seq_len], float32
        (float64 for float64), -inf where a query attends to nothing. Both are differentiable, and
        both are nested where query is.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given; with a group
            also where ranks differ, and then on every rank.
        RuntimeError: no group has the name; a rank is dead, or did not come within the group's
            timeout; a CUDA graph is being captured and the pattern is not on the GPU yet.
    """
    with telling(group):
        scheme = Scheme.recall(segment_lengths, dilation_rates, head_offsets, padding)
        scale = check_scale(scale)
        dropout_p = check_dropout(dropout_p, "dropout_p")
        check_cache(pattern_cache)
        out, lse = attend(
            query,
            key,
            value,
            scheme,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            seq_lens=seq_lens,
            pattern_cache=pattern_cache,
            sharding=Sharding.make(group, shard_lengths, strategy, shard_layout),
        )
    return (out, lse) if return_lse else out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scheme: Scheme,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    pattern_cache: CacheArgument,
    sharding: Sharding | None = None,
    seq_lens: SeqLens | None = None,
    sequences: Table | None = None,
    dropout_steps: int = 0,
) -> tuple[Tensor, Tensor]:
    """`dilated_attention` for a checked scheme; returns (out, lse).

    sequences: of rows [1, T, H, D], as the operators take them. dropout_steps: added to
    dropout's seed.
    """
    shape = _shape_of(query, "query")
    key_shape = _shape_of(key, "key")
    value_shape = _shape_of(value, "value")
    if is_causal is not True and is_causal is not False:
        raise TypeError(f"is_causal must be a bool, got {is_causal!r}")
    if not type(query) is type(key) is type(value) is Tensor and is_sharded(query, key, value):
        settings: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
        settings |= {"dropout_p": dropout_p, "pattern_cache": pattern_cache}
        settings |= {"sharding": sharding, "sequences": sequences}
        return _attend_shards(query, key, value, scheme, seq_lens, settings)
    if seq_lens is not None or query.is_nested or key.is_nested or value.is_nested:
        whole_len = None
        if sharding is not None:
            if query.is_nested or key.is_nested or value.is_nested:
                raise ValueError(
                    "query, key and value must not be nested where a group is given, whose ranks "
                    "share sequences: give cu_seqlens or seq_lens, got a nested tensor"
                )
            whole_len = sum(sharding.lengths(shape[1]))
        packed = pack(query, key, value, seq_lens, whole_len)
        if packed is not None and (sharding is None or shape[0] > 0):
            if sharding is not None:
                sharding = sharding.of_batch(shape[1], shape[0])
            out, lse = attend(
                *packed.rows,
                scheme,
                is_causal=is_causal,
                scale=scale,
                dropout_p=dropout_p,
                pattern_cache=pattern_cache,
                sharding=sharding,
                sequences=packed.sequences,
                dropout_steps=dropout_steps,
            )
            return packed.unpack(out, lse)
    options = _options(query, scheme, is_causal, scale, dropout_p, dropout_steps, sequences)
    rows = (query, key, value, scheme.segment_lengths, scheme.dilation_rates)
    if sharding is not None:
        check_ring_cache(pattern_cache)
        return ops.ring_attention(
            *rows,
            sharding.group_name,
            head_offsets=_offset_tensor(scheme, shape[2]),
            shard_lengths=sharding.shard_lengths,
            strategy=sharding.strategy,
            shard_layout=sharding.shard_layout,
            **options,
        )
    # Compilers, transforms and tensor subclasses (fake tensors among them) must not meet the
    # cache's tensors, and traces are for other lengths too.
    is_plain = type(query) is Tensor or type(query) is Parameter
    is_transformed = in_transform()
    has_values = is_plain and not (is_transformed or is_traced())
    found = None
    if pattern_cache is not False and has_values and not isinstance(sequences, Tensor):
        cache = current_pattern_cache() if pattern_cache is None else pattern_cache
        spec = make_spec(scheme, shape[1], shape[2], key_shape[2], is_causal, sequences)
        found = cache.find(spec, query.device)
        if found is None and key_shape == value_shape and _fit(query, key, value):
            found = cache.lookup_missing(spec, query.device)
    if found is None:
        offsets = _offset_tensor(scheme, shape[2])
    else:
        offsets, options["pattern"] = found[0].head_offsets, found[1]
    if offsets is not None:
        options["head_offsets"] = offsets
    if is_transformed:
        seed = options.pop("dropout_seed", None)
        call = Call(scheme.segment_lengths, scheme.dilation_rates, options)
        return attention_in_transform(query, key, value, call, seed)
    return ops.attention(*rows, **options)


def _options(
    query: Tensor,
    scheme: Scheme,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    dropout_steps: int,
    sequences: Table | None,
) -> dict[str, Any]:
    """The operators'; parsing one takes time on the host, so defaults are left out."""
    options: dict[str, Any] = {}
    if is_causal:
        options["is_causal"] = True
    if scale is not None:
        options["scale"] = scale
    if scheme.padding != "masked":
        options["padding"] = scheme.padding
    if dropout_p > 0.0:
        options["dropout_p"] = dropout_p
        # On the device, so that drawing it needs no synchronisation; activation checkpointing
        # restores the generator and so repeats it.
        seed = torch.randint(_MAX_SEED, (1,), dtype=torch.int64, device=query.device)
        options["dropout_seed"] = seed + dropout_steps if dropout_steps else seed
    if sequences is not None:
        options["sequences"] = sequences if isinstance(sequences, Tensor) else sequences.tensor
    return options


def _attend_shards(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scheme: Scheme,
    seq_lens: SeqLens | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """`attend` of DTensors: on each rank of its own batch entries and heads."""
    if settings["sharding"] is not None:
        raise ValueError(f"query must be no DTensor where a group is given, got {query.shape}")
    shards = shards_of(query=query, key=key, value=value)
    q, k, v = shards.rows
    entries, _, heads, _ = q.shape
    if seq_lens is not None:
        seq_lens = seq_lens[shards.first_entry : shards.first_entry + entries]
    out, lse = attend(
        q,
        k,
        v,
        scheme.of_heads(query.shape[2], shards.first_head, heads),
        seq_lens=seq_lens,
        dropout_steps=seed_steps(shards.first_entry, shards.first_head),
        **settings,
    )
    return shards.out(out), shards.of_heads(lse)


def make_spec(
    scheme: Scheme,
    seq_len: int,
    heads: int,
    kv_heads: int,
    is_causal: bool,
    sequences: Sequences | None = None,
) -> PatternSpec:
    """The pattern that a call needs now: for the forward pass alone where gradients are off."""
    return PatternSpec(
        seq_len,
        scheme.branches,
        scheme.head_offsets,
        heads,
        kv_heads,
        is_causal,
        scheme.padding,
        # One table serves both passes where each head has keys of its own.
        directions="both" if heads == kv_heads or is_grad_enabled() else "forward",
        sequences=sequences,
    )


def _offset_tensor(scheme: Scheme, heads: int) -> Tensor | None:
    if scheme.head_offsets == "interleaved":
        return None
    with outside_transforms():
        return torch.tensor(scheme.offset_table(heads), dtype=torch.int64, device="cpu")


def check_dropout(dropout: float, name: str = "dropout") -> float:
    """The probability; raises TypeError if it isn't a number, ValueError outside [0, 1)."""
    number = real(dropout, name)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must be at least 0 and below 1, got {dropout}")
    return number


def check_scale(scale: float | None) -> float | None:
    """The scale as a plain number; raises TypeError if it isn't one, ValueError if not finite."""
    if scale is None:
        return None
    number = real(scale, "scale")
    if is_symbolic(number):  # the operator checks it when it has a value
        return number
    if not abs(number) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    return float(number)


def check_cache(pattern_cache: CacheArgument) -> CacheArgument:
    """The argument itself; raises TypeError if it is neither a cache nor None nor False."""
    if (
        pattern_cache is None
        or pattern_cache is False
        or isinstance(pattern_cache, BasePatternCache)
    ):
        return pattern_cache
    raise TypeError(
        "pattern_cache must be a PatternCache, a TieredPatternCache, None or False, "
        f"got {pattern_cache!r}"
    )


def check_ring_cache(pattern_cache: CacheArgument) -> None:
    """Raises ValueError if a cache is given: a ring uses `current_pattern_cache()`."""
    if pattern_cache is not None:
        raise ValueError(
            "pattern_cache must be None where a group is given, whose patterns are kept in "
            f"current_pattern_cache(), got {pattern_cache!r}"
        )


def _shape_of(tensor: Tensor, name: str) -> torch.Size:
    if type(tensor) is not Tensor:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        refuse_masked(tensor, name)
    if tensor.is_nested and tensor.layout is not torch.jagged:
        raise ValueError(f"{name} must have the layout torch.jagged if nested, got {tensor.layout}")
    shape = tensor.shape
    if len(shape) != 4:
        raise ValueError(
            f"{name} must be [batch, seq_len, heads, head_dim], got shape {tuple(shape)}"
        )
    return shape


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether a pattern is worth planning: if not, the operator says which argument is wrong."""
    batch, seq_len, heads, head_dim = query.shape
    if not (0 < heads < HEADS_END and 0 < head_dim <= 256):
        return False
    kv_heads = key.shape[2]
    if (batch, seq_len, kv_heads, head_dim) != key.shape or kv_heads < 1 or heads % kv_heads:
        return False
    dtype, device = query.dtype, query.device
    if dtype not in _DTYPES or key.device != device or value.device != device:
        return False
    return (key.dtype is dtype and value.dtype is dtype) or torch.is_autocast_enabled(device.type)
