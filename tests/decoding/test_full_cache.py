"""Attention over a full cache against one causal call over each text."""

from __future__ import annotations

import random

import pytest
import torch

from dilated_attention_pytorch import (
    PatternCache,
    dilated_attention,
    dilated_attention_with_kvcache,
)
from tests.decoding.texts import assert_close, random_case


@pytest.mark.parametrize("seed", range(400, 460))
def test_the_last_positions_of_a_causal_call(seed: int) -> None:
    """Texts of different lengths in a cache whose other rows are NaN; some rows are appended."""
    case, draw = random_case(seed), random.Random(seed)
    q, k, v = case.qkv(seed, batch=2)
    ends = [case.seq_len, draw.randint(1, case.seq_len)]
    n, m = (draw.randint(1, min(ends)), draw.randint(0, min(ends)))
    key_cache, value_cache = (torch.full_like(x, torch.nan) for x in (k, v))
    query, key, value = (q[:, :n].clone(), k[:, :m].clone(), v[:, :m].clone())
    for b, end in enumerate(ends):
        key_cache[b, : end - m], value_cache[b, : end - m] = k[b, : end - m], v[b, : end - m]
        key[b], value[b] = k[b, end - m : end], v[b, end - m : end]
        query[b] = q[b, end - n : end]
    out, lse = dilated_attention_with_kvcache(
        query,
        key_cache,
        value_cache,
        torch.tensor(ends) - m,
        case.segment_lengths,
        case.dilation_rates,
        key=key if m else None,
        value=value if m else None,
        head_offsets=case.table,
        return_lse=True,
        pattern_cache=draw.choice([None, False, PatternCache()]),
    )
    for b, end in enumerate(ends):
        expected = case.reference(*(x[b : b + 1, :end] for x in (q, k, v)))
        expected = expected[0][:, end - n :], expected[1][:, :, end - n :]
        assert_close((out[b : b + 1], lse[b : b + 1]), expected)
        assert torch.equal(key_cache[b, :end], k[b, :end])
        assert torch.equal(value_cache[b, :end], v[b, :end])
        assert torch.all(key_cache[b, end:].isnan()) and torch.all(value_cache[b, end:].isnan())


@pytest.mark.parametrize("length", [5, torch.tensor(5), torch.tensor([5, 5], dtype=torch.int32)])
def test_lengths_may_be_one_number_for_all_texts(length: int | torch.Tensor) -> None:
    x = torch.randn(2, 8, 2, 4, dtype=torch.float64)
    out = dilated_attention_with_kvcache(x[:, 3:5], x, x, length, [4], [1])
    expected = dilated_attention(x[:, :5], x[:, :5], x[:, :5], [4], [1], is_causal=True)
    torch.testing.assert_close(out, expected[:, 3:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("offsets", ["interleaved", [[0] * 4, [1, 0, 1, 0]]])
def test_a_compiled_step_holds_the_lattices_as_a_constant(
    dynamic: bool | None, offsets: str | list[list[int]]
) -> None:
    """Made in the graph they would be copied to the device at every step."""
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def step(query: torch.Tensor) -> torch.Tensor:
        return dilated_attention_with_kvcache(query, x, x, 5, [4, 8], [1, 2], head_offsets=offsets)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=keep, fullgraph=True, dynamic=dynamic)
    query = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(compiled(query), step(query))
    (graph,) = graphs
    (call,) = (n for n in graph.graph.nodes if n.target is torch.ops.dilated.decode_attend.default)
    assert call.args[4].op == "get_attr"
