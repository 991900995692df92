"""What only a GPU shows: streams, graphs, memory, offsets past 2^31, determinism."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import PatternCache, TieredPatternCache, dilated_attention
from tests.conftest import make_qkv, missing_cuda
from tests.ops.blocks import make_query_sums
from tests.ops.calls import deterministic_mode
from tests.planning import Spec, plan_tensor

LENGTHS, RATES = [128, 400], [1, 3]


@pytest.fixture(autouse=True)
def gpu() -> None:
    if (reason := missing_cuda()) is not None:
        pytest.skip(reason)


def inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return make_qkv(
        777, 6, 48, kv_heads=3, dtype=torch.bfloat16, device="cuda", requires_grad=requires_grad
    )


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = dilated_attention(q, k, v, LENGTHS, RATES, is_causal=True)
    assert isinstance(out, Tensor)
    return out


def gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(q, k, v).float().square().sum(), (q, k, v))


def test_deterministic_backward_repeats_to_the_bit() -> None:
    tensors = inputs()
    with deterministic_mode():
        first, *others = (gradients(*tensors) for _ in range(4))
    for other in others:
        for again, before in zip(other, first, strict=True):
            assert torch.equal(again, before)


def test_deterministic_gradients_of_queries_without_keys_are_zero() -> None:
    tensors = make_qkv(4096, 8, 256, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    on_the_lattice = torch.arange(4096, device="cuda")[:, None] % 8 == torch.arange(8).cuda()
    with deterministic_mode():
        for _ in range(10):
            out = dilated_attention(*tensors, [64], [8])
            assert isinstance(out, Tensor)
            (grad,) = torch.autograd.grad(out.float().square().sum(), tensors[0])
            assert not grad[0][~on_the_lattice].any()


def test_the_fast_backward_agrees_with_the_deterministic_one() -> None:
    tensors = inputs()
    fast = gradients(*tensors)
    with deterministic_mode():
        slow = gradients(*tensors)
    for a, b in zip(fast, slow, strict=True):
        assert (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("repeatable", [False, True])
def test_a_graph_replays_forward_and_backward(repeatable: bool) -> None:
    q, k, v = inputs()
    fresh = make_qkv(777, 6, 48, kv_heads=3, dtype=torch.bfloat16, device="cuda", seed=1)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with deterministic_mode(repeatable):
        gradients(q, k, v)  # plans, copies the pattern and warms up
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradients(q, k, v)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = gradients(q, k, v)
        with torch.no_grad():
            for tensor, value in zip((q, k, v), fresh, strict=True):
                tensor.copy_(value)
        graph.replay()
        expected = gradients(q, k, v)
    for replayed, again in zip(captured, expected, strict=True):
        if repeatable:
            assert torch.equal(replayed, again)
        assert (replayed - again).float().norm() <= 1e-2 * again.float().norm()


def test_misaligned_query_sums_are_refused() -> None:
    q, k, v = inputs(requires_grad=False)
    out, lse = torch.ops.dilated.attention(q, k, v, [q.size(1)], [1])
    sums = make_query_sums(q)
    shifted = sums.new_zeros(sums.numel() + 1)[1:].view(sums.shape)
    block = (out, None, q, k, v, out, lse, q.size(1), 0, 0, [q.size(1)], [1])
    torch.ops.dilated.attention_block_backward_into(sums, *block)
    with pytest.raises(ValueError, match="grad_query_sums: must begin at a multiple of 16"):
        torch.ops.dilated.attention_block_backward_into(shifted, *block)
    with pytest.raises(ValueError, match="grad_query_sums: must begin at a multiple of 16"):
        torch.ops.dilated.round_query_sums(shifted, q)


def test_work_follows_the_current_stream() -> None:
    q, k, v = inputs(requires_grad=False)
    expected = attend(q, k, v)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # The side stream is busy first: work on another stream would read the zeros.
        late = torch.zeros_like(q)
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        out = attend(late, k, v)
    side.synchronize()
    assert torch.equal(out, expected)


def test_a_graph_of_a_gather_refuses_offsets_that_a_replay_would_not_find() -> None:
    x = torch.randn(1, 64, 257, 16, device="cuda")
    offsets = torch.zeros(257, dtype=torch.int64)
    torch.ops.dilated.gather(x, 32, 2, head_offsets=offsets)
    with (
        pytest.raises(RuntimeError, match="head_offsets: must be of at most 256 heads .* got 257"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.ops.dilated.gather(x, 32, 2, head_offsets=offsets)


def test_runs_where_the_tensors_are() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")

    def results(device: str) -> list[Tensor]:
        q, k, v = (x.detach().to(device).requires_grad_() for x in inputs())
        x = k.detach()
        packed = torch.ops.dilated.gather(x, 32, 2)
        with deterministic_mode():
            return [
                attend(q, k, v).detach(),
                *gradients(q, k, v),
                packed,
                torch.ops.dilated.scatter_add(x, packed, 32, 2),
            ]

    torch.cuda.set_device(0)
    for here, there in zip(results("cuda:0"), results("cuda:1"), strict=True):
        assert there.device == torch.device("cuda:1")
        assert torch.equal(here, there.to("cuda:0"))


def _peak_beyond(function, kept: int) -> int:  # type: ignore[no-untyped-def]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before - kept


def test_memory_beyond_inputs_and_outputs() -> None:
    shape = (1, 32768, 12, 64)
    q, k, v, g = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    branches = ([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16])
    lse_bytes = 4 * shape[1] * shape[2]
    dilated_attention(q, k, v, *branches)  # the pattern is cached from now on
    extra = _peak_beyond(lambda: dilated_attention(q, k, v, *branches), q.nbytes)
    assert extra <= 0.05 * q.nbytes + lse_bytes
    for tensor in (q, k, v):
        tensor.requires_grad_()
    out = dilated_attention(q, k, v, *branches)
    assert isinstance(out, Tensor)
    extra = _peak_beyond(
        lambda: torch.autograd.grad(out, (q, k, v), g, retain_graph=True), 3 * q.nbytes
    )
    assert extra <= 2.2 * q.nbytes


def test_nothing_is_read_before_or_after_the_inputs() -> None:
    """Where an allocation of this size begins, nothing may be mapped in front of it."""
    seq_len = 30011
    shape = (1, seq_len, 32, 48)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    out = dilated_attention(q, k, v, [1024, 5792, seq_len], [1, 4, 16])
    assert isinstance(out, Tensor)
    assert out.isfinite().all()


def test_offsets_past_two_to_the_31() -> None:
    rows, heads, head_dim, segment = 2**18, 66, 128, 256
    assert rows * heads * head_dim > 2**31
    tensors = [
        torch.randn((1, rows, heads, head_dim), device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    grad = torch.randn_like(tensors[0])

    def run(parts: list[Tensor], upstream: Tensor) -> list[Tensor]:
        parts = [part.detach().requires_grad_() for part in parts]
        out = dilated_attention(parts[0], parts[1], parts[2], [segment], [1])
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, parts, upstream)]

    whole = run(tensors, grad)
    tail = run([t[:, -segment:].contiguous() for t in tensors], grad[:, -segment:].contiguous())
    for large, small in zip(whole, tail, strict=True):
        difference = (large[:, -segment:].float() - small.float()).norm()
        assert difference <= 1e-2 * small.float().norm()


def test_gather_and_scatter_past_two_to_the_31() -> None:
    rows, heads, head_dim, segment = 2**18, 66, 128, 256
    x = torch.randn((1, rows, heads, head_dim), device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    tail = x[:, -segment:].clone()
    packed = torch.ops.dilated.gather(x, segment, 1)
    assert torch.equal(packed[:, -segment:], tail)
    torch.ops.dilated.scatter_into(x, packed, segment, 1, accumulate=True)
    assert torch.equal(x[:, -segment:], 2 * tail)


SMALLER = """
from itertools import product
import torch
from tests.ops.test_attention_numerics import check_16_bit_errors
cases = product((48, 64, 96, 128, 256), (False, True), (False, True))
for head_dim, is_causal, deterministic in cases:
    check_16_bit_errors(torch.bfloat16, head_dim, is_causal, "cuda", deterministic, seq_len=700)
print("done")
"""


@pytest.mark.parametrize("kibibytes", [99, 163])  # of an L40S or an RTX; of an A100
def test_the_kernels_of_gpus_with_less_shared_memory(kibibytes: int) -> None:
    done = run(SMALLER, DILATED_SHARED_MEMORY_BYTES=str(kibibytes * 1024))
    assert done.returncode == 0 and "done" in done.stdout, done.stderr


@pytest.mark.parametrize("given", ["1000", "99KiB", ""])
def test_less_shared_memory_than_every_gpu_has_is_refused(given: str) -> None:
    done = run(SMALLER, DILATED_SHARED_MEMORY_BYTES=given)
    expected = "DILATED_SHARED_MEMORY_BYTES: must be a number of bytes, at least 101376, got "
    assert f'ValueError: {expected}"{given}"' in done.stderr


def test_a_pattern_at_an_odd_place_is_refused() -> None:
    q = torch.zeros(1, 100, 2, 16, device="cuda", dtype=torch.float16)
    words = plan_tensor(Spec(100, [32], [1], 2, 2))
    shifted = torch.cat((words.new_zeros(1), words)).cuda()[1:]
    with pytest.raises(ValueError, match="pattern: must begin at a multiple of 16 bytes"):
        torch.ops.dilated.attention(q, q, q, [32], [1], pattern=shifted)


def test_the_first_call_with_words_of_unknown_origin_compares_them() -> None:
    q = torch.zeros(1, 100, 2, 16, device="cuda", dtype=torch.float16)
    words = plan_tensor(Spec(100, [32], [1], 2, 2)).cuda()

    def attend(pattern: Tensor) -> None:
        torch.ops.dilated.attention(q, q, q, [32], [1], pattern=pattern)

    attend(words)
    for spoiled in (words[:-4], plan_tensor(Spec(120, [32], [1], 2, 2)).cuda(), words.clone()):
        if len(spoiled) == len(words):
            spoiled[-1] += 1
        with pytest.raises(ValueError, match="pattern: must"):
            attend(spoiled)
    words[40] += 1
    with pytest.raises(ValueError, match="pattern: must hold"):
        attend(words)
    words[40] -= 1
    attend(words)


def test_no_call_waits_for_the_words_of_a_cache() -> None:
    q = torch.zeros(1, 100, 2, 16, device="cuda", dtype=torch.float16)
    for cache in (PatternCache(), TieredPatternCache()):
        torch.cuda.set_sync_debug_mode("error")
        try:
            dilated_attention(q, q, q, [32], [1], pattern_cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[2],
    )


FOREIGN = """
import torch, dilated_attention_pytorch
from dilated_attention_pytorch import _C
def plan(seq_len):
    spec = _C.PatternSpec(seq_len=seq_len, branches=[_C.Branch(32, 1)], heads=2, kv_heads=2)
    words = _C.plan(spec)
    return torch.frombuffer(words, dtype=torch.int32).cuda()
pattern, other = plan(100), plan(100)
other[10] += 1
q = torch.zeros(1, 100, 2, 16, device="cuda", dtype=torch.float16)
def attend(words):
    torch.ops.dilated.attention(q, q, q, [32], [1], pattern=words)
    torch.cuda.synchronize()
def replay_after(change):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.dilated.attention(q, q, q, [32], [1], pattern=pattern)
    graph.replay()
    torch.cuda.synchronize()
    print("its graph passes")
    change()
    graph.replay()
    torch.cuda.synchronize()
def spoil():
    pattern[-1] += 1
attend(pattern)
replay_after({misuse})
"""


@pytest.mark.parametrize("misuse", ["pattern.zero_", "spoil", "lambda: pattern.copy_(other)"])
def test_a_graph_whose_pattern_was_written_to_stops_the_program(misuse: str) -> None:
    done = run(FOREIGN.replace("{misuse}", misuse))
    assert "its graph passes" in done.stdout, done.stderr
    assert done.returncode != 0
    assert "pattern was planned for the arguments of this call" in done.stderr + done.stdout
    assert "device-side assert" in done.stderr
