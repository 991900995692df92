"""A step that a CUDA graph captured, replayed for every position."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import (
    DilatedKVCache,
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_with_kvcache,
)
from tests.conftest import make_qkv, missing_cuda

BRANCHES = ([16, 48, 96, 37], [1, 2, 4, 5])


@pytest.fixture
def capturing() -> Iterator[None]:
    if (reason := missing_cuda()) is not None:
        pytest.skip(reason)
    with torch.no_grad():
        yield
    torch.cuda.synchronize()


def texts(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v of 300 positions on the GPU, and the output in float64."""
    rows = make_qkv(300, 8, 64, batch=2, kv_heads=2, dtype=dtype, device="cuda")
    exact = [x.double().cpu() for x in rows]
    return list(rows), dilated_attention(*exact, *BRANCHES, is_causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_graph_replays_every_step(capturing: None, dtype: torch.dtype) -> None:
    (q, k, v), expected = texts(dtype)
    cache = DilatedKVCache(
        2, 2, 64, *BRANCHES, num_heads=8, max_seq_len=300, dtype=dtype, device="cuda"
    )
    cache.append(k[:, :40], v[:, :40], seq_lens=[40, 33])
    cache.attend(q[:, :40])
    query, key, value = (x[:, :1].clone() for x in (q, k, v))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.append(key, value)
        out = cache.attend(query)
    assert cache.lengths == (40, 33)  # capturing runs nothing
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for step in range(250):
        places = [40 + step, 33 + step]
        for to, source in ((query, q), (key, k), (value, v)):
            to.copy_(torch.stack([source[b, p : p + 1] for b, p in enumerate(places)]))
        graph.replay()
        wanted = torch.stack([expected[b, p : p + 1] for b, p in enumerate(places)])
        torch.testing.assert_close(out.double().cpu(), wanted, rtol=tolerance, atol=tolerance)
    assert cache.lengths == (290, 283) and cache.fork().lengths == (290, 283)
    cache.append(k[:, 290:], v[:, 290:])  # and on without the graph
    actual = cache.attend(q[:, 290:])[0]
    torch.testing.assert_close(
        actual.double().cpu(), expected[0, 290:], rtol=tolerance, atol=tolerance
    )
    with pytest.raises(ValueError, match=r"indices must be 2, as many as the batch that a CUDA"):
        cache.reorder([0])
    cache.reset()
    graph.replay()
    assert cache.lengths == (1, 1)


def test_a_graph_replays_steps_over_a_full_cache(capturing: None) -> None:
    (q, k, v), expected = texts(torch.bfloat16)
    key_cache, value_cache = (torch.full_like(x, torch.nan) for x in (k, v))
    key_cache[:, :40], value_cache[:, :40] = k[:, :40], v[:, :40]
    lengths = torch.tensor([40, 40], device="cuda")
    step = [x[:, :1].clone() for x in (q, k, v)]

    def attend() -> Tensor:
        return dilated_attention_with_kvcache(
            step[0], key_cache, value_cache, lengths, *BRANCHES, key=step[1], value=step[2]
        )

    attend()  # copies the pattern's table to the GPU
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
        lengths += 1
    for p in range(40, 300):
        for to, source in zip(step, (q, k, v), strict=True):
            to.copy_(source[:, p : p + 1])
        graph.replay()
        torch.testing.assert_close(out.double().cpu(), expected[:, p : p + 1], rtol=2e-2, atol=2e-2)


def test_a_layer_is_captured_as_a_whole(capturing: None) -> None:
    layer = MultiheadDilatedAttention(128, 4, *BRANCHES, device="cuda").eval()
    x = torch.randn(1, 200, 128, device="cuda")
    expected, _ = layer(x, is_causal=True)
    cache = layer.make_kv_cache(1)
    layer(x[:, :20], is_causal=True, kv_cache=cache)
    layer(x[:, 20:21], is_causal=True, kv_cache=cache.fork())  # warms up the layer's products
    row = x[:, :1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = layer(row, is_causal=True, kv_cache=cache)
    for p in range(20, 200):
        row.copy_(x[:, p : p + 1])
        graph.replay()
        torch.testing.assert_close(out, expected[:, p : p + 1], rtol=1e-3, atol=1e-3)


def test_what_the_host_would_have_to_do_is_refused(capturing: None) -> None:
    x = torch.zeros(1, 1, 2, 8, device="cuda")
    growing = DilatedKVCache(1, 2, 8, [2**40], [1], device="cuda")
    bounded = DilatedKVCache(1, 2, 8, [16], [1], device="cuda")
    for cache, options, said in (
        (growing, {}, "max_seq_len must be given where a CUDA graph captures an append, got None"),
        (bounded, {"seq_lens": [1]}, "no seq_lens must be given where a CUDA graph captures"),
    ):
        with (
            pytest.raises(ValueError, match=said),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            cache.append(x, x, **options)


def test_memory_does_not_grow_with_what_is_replayed(capturing: None) -> None:
    """40,000 steps; the last ones have the numbers of a text that begins at their segment."""
    cache = DilatedKVCache(1, 2, 64, [64, 512], [1, 4], num_heads=4, device="cuda")
    row = torch.arange(64, device="cuda")
    position = torch.zeros(1, dtype=torch.int64, device="cuda")

    def rows_at(places: Tensor, heads: int) -> Tensor:
        """[1, n, heads, 64]: what a position has is a function of it."""
        head = torch.arange(heads, device=places.device)[:, None]
        return (places[:, None, None] % 977 * (head + 1) * 0.37 + row.to(places.device)).sin()[None]

    def step() -> Tensor:
        key = rows_at(position, 2)
        cache.append(key, key.cos())
        out = cache.attend(rows_at(position, 4) * 3)
        position.add_(1)
        return out

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    torch.cuda.synchronize()
    allocated, nbytes = torch.cuda.memory_allocated(), cache.nbytes
    for _ in range(39_999):
        graph.replay()
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), cache.nbytes) == (allocated, nbytes)
    assert cache.length == 40_000
    text = torch.arange(40_000 // 512 * 512, 40_000, device="cuda")
    key = rows_at(text, 2)
    expected = dilated_attention(
        rows_at(text, 4) * 3, key, key.cos(), [64, 512], [1, 4], is_causal=True
    )
    torch.testing.assert_close(out, expected[:, -1:], rtol=1e-4, atol=1e-4)
