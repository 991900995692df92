"""What can be refused is refused before anything travels, on all ranks, and calls go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dilated_attention_pytorch import (
    DilatedAttention,
    MultiheadDilatedAttention,
    PatternCache,
    dilated_attention,
    dilated_attention_varlen,
)
from dilated_attention_pytorch.pattern import Pattern, current_pattern_cache
from dilated_attention_pytorch.ring import kernels
from tests.conftest import make_qkv
from tests.ring.processes import Processes, group_of
from tests.ring.test_later_calls import good, see

NAN = float("nan")


def attend(group: dist.ProcessGroup, **change: Any) -> None:
    tensors = [change.pop("query", make_qkv(20, 4, 8)[0]), *make_qkv(20, 4, 8)[1:]]
    branches = change.pop("branches", ([16, 40], [1, 2]))
    dilated_attention(*tensors, *branches, group=group, **change)


def operate(group: dist.ProcessGroup, **change: Any) -> None:
    tensors = change.pop("tensors", make_qkv(20, 4, 8))
    branches = change.pop("branches", ([16, 40], [1, 2]))
    torch.ops.dilated.ring_attention(*tensors, *branches, group.group_name, **change)


def call_module(group: dist.ProcessGroup, bad: object) -> None:
    DilatedAttention([16, 40], [1, 2], group=group)(bad, *make_qkv(20, 4, 8)[1:])


def call_multihead(group: dist.ProcessGroup, width: int) -> None:
    module: nn.Module = MultiheadDilatedAttention(32, 4, [16, 40], [1, 2], group=group)
    module(torch.zeros(1, 20, width))


def attend_nested(group: dist.ProcessGroup, **change: Any) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(n, 4, 8) for n in (3, 5)], layout=torch.jagged)
    dilated_attention(nested, nested, nested, [16, 40], [1, 2], group=group, **change)


def attend_packed(group: dist.ProcessGroup, cu_seqlens: list[int]) -> None:
    rows = (x[0] for x in make_qkv(20, 4, 8))
    dilated_attention_varlen(*rows, cu_seqlens, [16, 40], [1, 2], group=group)


def call_padded(
    group: dist.ProcessGroup, shard_lengths: list[int] | None = None, **padding: Any
) -> None:
    module: nn.Module = MultiheadDilatedAttention(
        32, 4, [16, 40], [1, 2], group=group, shard_lengths=shard_lengths
    )
    module(torch.zeros(1, 20, 32), **padding)


Call = Callable[[dist.ProcessGroup], object]
PYTHON: dict[str, tuple[Call, str]] = {
    "segments": (partial(attend, branches=([0], [1])), "ValueError: segment_lengths"),
    "lists": (partial(attend, branches=([16], [1, 2])), "ValueError: "),
    "no list": (partial(attend, branches=(16, 1)), "TypeError: "),
    "scale": (partial(attend, scale=NAN), "ValueError: scale"),
    "dropout": (partial(attend, dropout_p=1.0), "ValueError: dropout_p"),
    "padding": (partial(attend, padding="none"), "ValueError: padding"),
    "offsets": (partial(attend, head_offsets="diagonal"), "ValueError: head_offsets"),
    "causal": (partial(attend, is_causal=1), "TypeError: is_causal"),
    "no tensor": (partial(attend, query=3), "TypeError: query"),
    "rank of query": (partial(attend, query=torch.zeros(3)), "ValueError: query"),
    "cache": (partial(attend, pattern_cache=PatternCache()), "ValueError: pattern_cache"),
    "shards": (partial(attend, shard_lengths=[20]), "ValueError: shard_lengths"),
    "long shards": (partial(attend, shard_lengths=[20, 20, 2**62]), "ValueError: shard_lengths"),
    "strategy": (partial(attend, strategy="rign"), "ValueError: strategy"),
    "what the dispatcher refuses": (partial(attend, shard_lengths=[20, 20, 2**70]), "Error: "),
    "lengths": (partial(attend, seq_lens=[61]), "ValueError: seq_lens must end at seq_len, 60"),
    "offsets of sequences": (
        partial(attend_packed, cu_seqlens=[0, 61]),
        "ValueError: cu_seqlens must end at the number of rows, 60",
    ),
    "lengths beyond numbers": (
        partial(attend, seq_lens=[(2**62, 2**62)]),
        "ValueError: seq_lens must end at seq_len, 60",
    ),
    "lengths without values": (
        partial(attend, seq_lens=torch.ones(1, dtype=torch.int64, device="meta")),
        "ValueError: seq_lens must have values",
    ),
    "nested": (attend_nested, "ValueError: query, key and value must not be nested"),
    "nested, with lengths": (
        partial(attend_nested, seq_lens=[3, 5]),
        "ValueError: query, key and value must not be nested",
    ),
    "a layer's lengths": (
        partial(call_padded, seq_lens=[61]),
        "ValueError: seq_lens must end at seq_len, 60",
    ),
    "a layer's mask": (
        partial(call_padded, key_padding_mask=torch.zeros(1, 20, dtype=torch.bool)),
        "ValueError: key_padding_mask must be None where a group is given",
    ),
    "a layer's weights": (partial(call_padded, need_weights=True), "ValueError: need_weights"),
    "a module": (partial(call_module, bad=torch.zeros(3)), "ValueError: query"),
    "a multi-head module": (partial(call_multihead, width=31), "ValueError: query"),
}


def refuse_on_rank_1(size: int, bad: Call) -> list[str]:
    group = group_of(size)
    expected = good(group)
    text = see(bad, group) if group.rank() == 1 else see(good, group)
    for _ in range(2):
        assert torch.equal(good(group), expected)
    return [text, see(bad, group)]


@pytest.mark.parametrize("name", PYTHON)
def test_what_python_refuses_is_told_in_its_place(workers: Processes, name: str) -> None:
    bad, named = PYTHON[name]
    (first, _), (second, _), (third, _) = results = workers.run(3, refuse_on_rank_1, bad)
    assert named in second and "refused" not in second
    assert first == third == f"Disagreement: rank 1 refused its arguments: {second}"
    assert all(everywhere == second for _, everywhere in results)


ROWS: dict[str, Call] = {
    "of an operator": partial(operate, shard_lengths=[20, 21, 20]),
    "of a batch": partial(attend, seq_lens=[20], shard_lengths=[20, 21, 20]),
    "of a layer": partial(call_padded, seq_lens=[20], shard_lengths=[20, 21, 20]),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_rank_has_its_rows(workers: Processes, name: str) -> None:
    first, second, third = workers.run(3, refuse_everywhere, ROWS[name])
    text = "query: must have the rows of rank 1 by shard_lengths, 21, got 20"
    assert second == f"ValueError: {text}"
    assert first == third == f"Disagreement: rank 1 refused its arguments: {second}"


FIVES = torch.full((1, 4), 5)
LONG = torch.zeros(1, 1, 4, 8).expand(1, 2**30, 4, 8)
PLANNER: dict[str, tuple[Call, str]] = {
    "65 lattices": (partial(attend, branches=([60] * 65, [1] * 65)), "at most 64"),
    "offsets": (partial(operate, branches=([16], [1]), head_offsets=FIVES), "head_offsets"),
    "offsets, all_to_all": (
        partial(operate, branches=([60], [1]), head_offsets=FIVES, strategy="all_to_all"),
        "head_offsets",
    ),
    "heads": (
        partial(operate, tensors=[torch.zeros(1, 20, 65536, 1)] * 3, branches=([16], [1])),
        "heads",
    ),
    "positions": (partial(operate, tensors=[LONG] * 3), "seq_len"),
    "sequences beyond the rows": (
        partial(operate, sequences=torch.tensor([[0, 20], [20, 41]])),
        "sequences: must end within the 60 rows",
    ),
    "a sequence beyond numbers": (
        partial(operate, sequences=torch.tensor([[0, 2**40]])),
        "sequences: must end within the 60 rows",
    ),
    "sequences that overlap": (
        partial(operate, sequences=torch.tensor([[0, 20], [19, 1]])),
        "sequences: must ascend and not overlap",
    ),
    "sequences, all_to_all": (
        partial(operate, sequences=torch.tensor([[0, 20]]), strategy="all_to_all"),
        "strategy: must not be 'all_to_all' with sequences",
    ),
}


def refuse_everywhere(size: int, bad: Call) -> str:
    group = group_of(size)
    expected = good(group)
    text = see(bad, group)
    assert torch.equal(good(group), expected)
    return text


@pytest.mark.parametrize("name", PLANNER)
def test_what_the_planner_refuses_is_refused_before_anything_travels(
    workers: Processes, name: str
) -> None:
    bad, named = PLANNER[name]
    for text in workers.run(3, refuse_everywhere, bad):
        assert text.startswith("ValueError: ") and named in text


BAD_RESULTS: dict[str, Any] = {
    "grad_out": torch.ones(1, 3, 4, 8),
    "out": torch.ones(1, 20, 4, 8, dtype=torch.float16),
    "lse": torch.ones(1, 20, 4),
    "grad_lse": torch.ones(1, 4, 20, dtype=torch.float16),
    "head_offsets": torch.zeros(2, 4, dtype=torch.int64, device="meta"),
}


def refuse_in_backward(size: int, name: str, bad: torch.Tensor) -> str:
    """The kind of call is known by then."""
    group, tensors = group_of(size), make_qkv(20, 4, 8)
    call = (*tensors, [16, 40], [1, 2], group.group_name)
    query, key, value, *pattern = call
    out, lse = torch.ops.dilated.ring_attention(*call)
    results = {"grad_out": out, "grad_lse": lse, "out": out, "lse": lse, "head_offsets": None}
    if group.rank() == 1:
        results[name] = bad
    grads, offsets = (results["grad_out"], results["grad_lse"]), results["head_offsets"]
    rest = (query, key, value, results["out"], results["lse"], *pattern)
    expected = good(group)
    text = see(kernels.backward, *grads, *rest, head_offsets=offsets)  # not by the dispatcher
    assert torch.equal(good(group), expected)
    return text


@pytest.mark.parametrize("name", BAD_RESULTS)
def test_what_the_backward_refuses_is_told(workers: Processes, name: str) -> None:
    first, second, third = workers.run(3, refuse_in_backward, name, BAD_RESULTS[name])
    assert second.startswith(f"ValueError: {name}: must be")
    assert first == third == f"Disagreement: rank 1 refused its arguments: {second}"


def lack_memory(size: int, strategy: str) -> str:
    """Rank 1 can't plan the block that comes last."""
    group = group_of(size)
    expected = good(group)
    plan, planned = Pattern.plan, []

    def count(spec: Any) -> Pattern:
        planned.append(spec)
        return plan(spec)

    def fail(spec: Any) -> Pattern:
        if len(planned) == limit:
            raise MemoryError("bad_alloc")
        return count(spec)

    with mock.patch.object(Pattern, "plan", count):
        current_pattern_cache().clear()
        operate(group, strategy=strategy, scale=0.5)
        current_pattern_cache().clear()
    limit = len(planned) - 1
    planned.clear()
    with mock.patch.object(Pattern, "plan", fail if group.rank() == 1 else count):
        text = see(operate, group, strategy=strategy, scale=0.6)
    assert torch.equal(good(group), expected)
    return text


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
def test_memory_that_is_short_on_one_rank(workers: Processes, strategy: str) -> None:
    first, second, third = workers.run(3, lack_memory, strategy)
    assert second == "MemoryError: bad_alloc"
    assert first == third == f"Disagreement: rank 1 refused its arguments: {second}"
