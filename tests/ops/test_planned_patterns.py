"""What the operators keep of the patterns that they plan: found, bounded, counted, shared."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.pattern import (
    PlannedPatternCounts,
    clear_planned_patterns,
    max_pattern_bytes,
    planned_pattern_counts,
    resize_planned_patterns,
    set_max_pattern_bytes,
)
from tests.conftest import make_qkv, missing_cuda

attention = torch.ops.dilated.attention
BRANCHES = ([8, 20], [1, 2])


@pytest.fixture(autouse=True)
def cleared() -> Iterator[None]:
    """Graphs of other tests may have pinned patterns, which stay."""
    clear_planned_patterns()
    yield
    resize_planned_patterns()
    set_max_pattern_bytes(2**29)
    clear_planned_patterns()


def counted() -> tuple[int, int, int]:
    counts = planned_pattern_counts()
    return counts.misses, counts.hits, counts.evictions


def held() -> int:
    counts = planned_pattern_counts()
    return counts.entries - counts.pinned_entries


def rows(seq_len: int = 37, device: str = "cpu", heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(seq_len, heads, 16, dtype=torch.float32, device=device)


def test_an_equal_call_finds_the_pattern(device: str) -> None:
    q, k, v = (x.requires_grad_() for x in rows(device=device))
    out, _ = attention(q, k, v, *BRANCHES)
    assert counted() == (1, 0, 0) and held() == 1
    out.sum().backward()
    again, _ = attention(q, k, v, *BRANCHES)
    assert counted() == (1, 2, 0) and torch.equal(again, out)


def test_a_batch_is_joined_of_lengths_that_are_kept(device: str) -> None:
    q, k, v = rows(device=device)

    def call(*places: tuple[int, int]) -> Tensor:
        table = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
        return attention(q, k, v, *BRANCHES, sequences=table)[0]

    out = call((0, 20), (20, 17))
    assert counted() == (3, 0, 0)  # two lengths and the batch
    assert torch.equal(call((0, 20), (20, 17)), out)
    assert counted() == (3, 1, 0)
    call((1, 17), (18, 0), (19, 17))
    assert counted() == (4, 2, 0)  # a batch of a known length
    call((0, 20), (20, 16))
    assert counted() == (6, 3, 0)
    call()
    call((0, 0))
    assert counted() == (9, 4, 0)  # the length of 0 is one of both
    misses = counted()[0]
    attention(q[:, :20], k[:, :20], v[:, :20], *BRANCHES)
    assert counted()[0] == misses + (device != "cpu")  # what is on the host is the same
    resize_planned_patterns(max_entries=0)
    assert torch.equal(call((0, 20), (20, 17)), out)


def test_the_key_is_the_whole_specification(device: str) -> None:
    q, k, v = rows(device=device)
    offsets = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    one_kv_head = (q, k[:, :, :1], v[:, :, :1])
    calls: list[tuple[Any, dict[str, Any]]] = [
        ((q, k, v, [8, 20], [1, 2]), {}),
        ((q, k, v, [8, 21], [1, 2]), {}),
        ((q, k, v, [8, 20], [1, 3]), {}),
        ((q, k, v, [8, 20, 20], [1, 2, 2]), {}),
        ((q[:, 1:], k[:, 1:], v[:, 1:], [8, 20], [1, 2]), {}),
        ((q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], [8, 20], [1, 2]), {}),
        ((*one_kv_head, [8, 20], [1, 2]), {}),
        ((q, k, v, [8, 20], [1, 2]), {"is_causal": True}),
        ((q, k, v, [8, 20], [1, 2]), {"padding": "zeros"}),
        ((q, k, v, [8, 20], [1, 2]), {"head_offsets": offsets}),
    ]
    first = [attention(*arguments, **options)[0] for arguments, options in calls]
    assert counted() == (len(calls), 0, 0)
    for (arguments, options), out in zip(calls, first, strict=True):
        assert torch.equal(attention(*arguments, **options)[0], out)
        cached = dilated_attention(*arguments, **options)
        assert isinstance(cached, Tensor) and torch.equal(cached, out)
    assert counted() == (len(calls), len(calls), 0)


def test_what_is_no_part_of_the_specification_shares_a_pattern() -> None:
    q, k, v = rows()
    attention(q, k, v, *BRANCHES)
    attention(q.double(), k.double(), v.double(), *BRANCHES)
    attention(q[..., :8], k[..., :8], v[..., :8], *BRANCHES, scale=0.5)
    attention(q, k, v, *BRANCHES, dropout_p=0.5, dropout_seed=torch.tensor([3]))
    whole = torch.ops.dilated.attention_block(q, k, v, 37, 0, 0, *BRANCHES)
    assert torch.equal(whole[0], attention(q, k, v, *BRANCHES)[0])
    assert counted() == (1, 5, 0)


def test_offsets_are_compared_by_value() -> None:
    q, k, v = rows()
    offsets = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 1]])
    first, _ = attention(q, k, v, *BRANCHES, head_offsets=offsets)
    strided = offsets.t().contiguous().t()
    assert torch.equal(attention(q, k, v, *BRANCHES, head_offsets=strided)[0], first)
    assert counted() == (1, 1, 0)
    offsets[1, 0] = 1
    assert not torch.equal(attention(q, k, v, *BRANCHES, head_offsets=offsets)[0], first)
    assert counted() == (2, 1, 0)


def test_blocks_are_kept_by_their_ranges() -> None:
    q, k, v = rows()
    for _ in range(2):
        for begin in (0, 10):
            torch.ops.dilated.attention_block(q[:, :20], k, v, 37, begin, 0, *BRANCHES)
    assert counted() == (2, 2, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function_finds_the_pattern(dynamic: bool, device: str) -> None:
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, *BRANCHES, head_offsets="blocked", is_causal=True)
        assert isinstance(out, Tensor)
        return out.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for call in range(3):
        for seq_len in (37, 50) if dynamic else (37,):
            compiled(*(x.requires_grad_() for x in rows(seq_len, device))).backward()
            lengths = 2 if dynamic and (call, seq_len) > (0, 37) else 1
            assert planned_pattern_counts().misses == lengths
    assert planned_pattern_counts().hits == (10 if dynamic else 5)


def test_the_least_recently_used_goes_first() -> None:
    resize_planned_patterns(max_entries=2)
    for seq_len in (20, 21, 20, 22):  # 22 takes the place of 21
        attention(*rows(seq_len), *BRANCHES)
    assert counted() == (3, 1, 1) and held() == 2
    attention(*rows(20), *BRANCHES)
    attention(*rows(21), *BRANCHES)
    assert counted() == (4, 2, 2)


def test_bytes_are_bounded_and_counted() -> None:
    attention(*rows(20), *BRANCHES)
    one = planned_pattern_counts().bytes - planned_pattern_counts().pinned_bytes
    assert one > 0
    resize_planned_patterns(max_bytes=one)
    attention(*rows(20), *BRANCHES)
    assert counted() == (1, 1, 0)
    resize_planned_patterns(max_bytes=one - 1)
    assert counted() == (1, 1, 1) and held() == 0
    out, _ = attention(*rows(20), *BRANCHES)  # used, and not kept
    assert counted() == (2, 1, 2) and held() == 0 and out.isfinite().all()


def test_none_is_kept_where_none_may_be() -> None:
    resize_planned_patterns(max_entries=0)
    for _ in range(2):
        attention(*rows(), *BRANCHES)
    assert counted() == (2, 0, 2) and held() == 0


def test_clear_drops_patterns_and_counts() -> None:
    attention(*rows(), *BRANCHES)
    clear_planned_patterns()
    assert counted() == (0, 0, 0) and held() == 0
    attention(*rows(), *BRANCHES)
    assert counted() == (1, 0, 0)


def test_a_bound_is_checked() -> None:
    with pytest.raises(ValueError, match="max_entries must be at least 0, got -1"):
        resize_planned_patterns(max_entries=-1)
    with pytest.raises(TypeError, match="max_bytes"):
        resize_planned_patterns(max_bytes=1.5)  # type: ignore[arg-type]
    assert isinstance(planned_pattern_counts(), PlannedPatternCounts)


def test_a_failure_is_not_kept() -> None:
    offsets = torch.full((2, 4), 7)
    for _ in range(2):
        with pytest.raises(ValueError, match="head_offsets"):
            attention(*rows(), *BRANCHES, head_offsets=offsets)
    assert counted() == (2, 0, 0) and held() == 0


def test_a_pattern_that_has_become_too_large_is_refused() -> None:
    assert max_pattern_bytes() == 2**29
    attention(*rows(), *BRANCHES)
    set_max_pattern_bytes(100)
    with pytest.raises(ValueError, match="max_pattern_bytes"):
        attention(*rows(), *BRANCHES)


def in_threads(count: int, function: Callable[[int], None]) -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            barrier.wait()
            function(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_threads_that_miss_at_once_plan_once() -> None:
    x = torch.zeros(1, 40_000, 2, 1)
    table = torch.zeros(1, 2, dtype=torch.int64)

    def call(index: int) -> None:
        attention(x, x, x, [64], [64], head_offsets=table)

    in_threads(4, call)
    assert counted() == (1, 3, 0)


def test_threads_that_evict_each_other_get_their_own_patterns() -> None:
    resize_planned_patterns(max_entries=1)
    expected = {n: attention(*rows(n), *BRANCHES)[0] for n in range(20, 24)}

    def call(index: int) -> None:
        for step in range(50):
            n = 20 + (index + step) % 4
            assert torch.equal(attention(*rows(n), *BRANCHES)[0], expected[n])

    in_threads(4, call)
    assert held() <= 1


def test_threads_that_fail_at_once_all_fail() -> None:
    offsets = torch.full((2, 4), 7)

    def call(index: int) -> None:
        with pytest.raises(ValueError, match="head_offsets"):
            attention(*rows(), *BRANCHES, head_offsets=offsets)

    in_threads(4, call)
    assert held() == 0


def test_a_forked_process_begins_with_none_and_keeps_the_bounds() -> None:
    resize_planned_patterns(max_entries=1)
    attention(*rows(), *BRANCHES)
    stop = threading.Event()

    def keep_locked() -> None:
        while not stop.is_set():
            planned_pattern_counts()
            attention(*rows(20), *BRANCHES)

    thread = threading.Thread(target=keep_locked)
    thread.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # OpenMP's do not live on in a child
                begun = planned_pattern_counts()
                attention(*rows(9), *BRANCHES)
                attention(*rows(10), *BRANCHES)
                done = (begun.entries, begun.misses, held(), counted()) == (0, 0, 1, (2, 0, 1))
                os._exit(0 if done else 1)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def gpu() -> None:
    if (reason := missing_cuda()) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("gpu")
def test_streams_share_a_pattern_whose_memory_outlives_its_readers() -> None:
    resize_planned_patterns(max_entries=1)
    streams = [torch.cuda.Stream() for _ in range(4)]
    tensors = {n: rows(n, "cuda") for n in range(700, 704)}
    expected = {n: attention(*x, *BRANCHES)[0] for n, x in tensors.items()}
    torch.cuda.synchronize()
    results = []
    for step in range(64):
        n = 700 + step // 3 % 4
        with torch.cuda.stream(streams[step % 4]):
            torch.cuda._sleep(100_000)  # the words are read long after the next one evicts them
            results.append((n, attention(*tensors[n], *BRANCHES)[0]))
    torch.cuda.synchronize()
    for n, out in results:
        assert torch.equal(out, expected[n])


@pytest.mark.usefixtures("gpu")
def test_what_a_graph_captured_stays() -> None:
    q, k, v = rows(500, "cuda")
    expected, _ = attention(q, k, v, *BRANCHES)
    before = planned_pattern_counts()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention(q, k, v, *BRANCHES)
    counts = planned_pattern_counts()
    assert counts.pinned_entries == before.pinned_entries + 1
    assert counts.pinned_bytes > before.pinned_bytes and counts.bytes == before.bytes
    resize_planned_patterns(max_entries=0)
    clear_planned_patterns()
    for n in range(480, 500):  # would be given the memory, had it been released
        attention(*rows(n, "cuda"), *BRANCHES)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    misses = planned_pattern_counts().misses
    attention(q, k, v, *BRANCHES)
    assert planned_pattern_counts().misses == misses


@pytest.mark.usefixtures("gpu")
def test_a_graph_refuses_a_pattern_that_is_not_there_yet() -> None:
    q, k, v = rows(123, "cuda")
    with (
        pytest.raises(RuntimeError, match="pattern: must be given"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention(q, k, v, *BRANCHES)
    torch.cuda.synchronize()
    attention(q, k, v, *BRANCHES)
    assert held() == 1


@pytest.mark.usefixtures("gpu")
def test_another_thread_plans_while_a_graph_is_captured() -> None:
    (q, k, v), others = rows(500, "cuda"), rows(333, "cuda")
    expected, _ = attention(q, k, v, *BRANCHES)
    before = planned_pattern_counts().misses  # earlier graphs may have left patterns
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        thread = threading.Thread(target=lambda: attention(*others, *BRANCHES))
        thread.start()
        thread.join()
        out, _ = attention(q, k, v, *BRANCHES)
    graph.replay()
    assert torch.equal(out, expected) and planned_pattern_counts().misses == before + 1


def test_parts_of_a_batch_are_filed_by_the_tables_that_they_have() -> None:
    """A block with far keys plans a forward table alone, even of rows that require gradients."""
    query = torch.randn(1, 20, 4, 8).requires_grad_()
    key = torch.randn(1, 20, 2, 8)
    places = torch.tensor([[0, 12], [12, 8]])
    out, lse = torch.zeros(1, 20, 4, 8), torch.zeros(1, 4, 20)
    with torch.no_grad():
        torch.ops.dilated.attention_block_into(
            *(out, lse, query, key, key, key[:, :0], key[:, :0]),
            *(20, [0, 20], [0, 20], [], [8], [2]),
            sequences=places,
        )
    whole, _ = attention(query, key, key, [8], [2], sequences=places)
    torch.testing.assert_close(whole, out)
    whole.sum().backward()
    first = query.detach()[:, :12].requires_grad_()
    attention(first, key[:, :12], key[:, :12], [8], [2])[0].sum().backward()
    torch.testing.assert_close(first.grad, query.grad[:, :12])
    assert first.grad.any()


def test_a_block_is_not_taken_for_a_sequence() -> None:
    """Of as many rows, in a call of as many."""
    key, query = torch.randn(1, 20, 2, 8), torch.randn(1, 12, 2, 8)
    block = torch.ops.dilated.attention_block
    places = torch.tensor([[0, 12], [12, 8]])
    rows = torch.cat([query, query[:, :8]], 1)
    batch, _ = block(rows, key, key, 20, [0], [0], [8], [2], sequences=places)
    part, _ = block(query, key, key, 20, [0], [0], [8], [2])
    clear_planned_patterns()
    torch.testing.assert_close(block(query, key, key, 20, [0], [0], [8], [2])[0], part)
    torch.testing.assert_close(attention(rows, key, key, [8], [2], sequences=places)[0], batch)
