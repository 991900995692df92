"""Ragged batches under torch.compile, torch.export, checkpointing and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_varlen,
    seq_lens_of_mask,
)
from tests.conftest import Exact, make_qkv

BRANCHES = ([16, 64], [1, 4])
LENGTHS = [[70, 33, 0], [1, 2, 3], [70, 70, 70], [64, 16, 50]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def padded(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Any:
    return dilated_attention(q, k, v, *BRANCHES, seq_lens=seq_lens, return_lse=True)


def packed(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Any:
    offsets = torch.cat([seq_lens.new_zeros(1), seq_lens.cumsum(0)])
    rows = (x.flatten(0, 1) for x in (q, k, v))
    return dilated_attention_varlen(*rows, offsets, *BRANCHES, return_lse=True)


def masked(q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Any:
    mask = torch.arange(q.size(1))[None] >= seq_lens[:, None]
    return padded(q, k, v, seq_lens_of_mask(mask))


def gradients(results: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    out, lse = results
    return list(torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), inputs))


@pytest.mark.parametrize("call", [padded, packed, masked])
def test_one_program_serves_all_lengths(call: Any) -> None:
    inputs = make_qkv(70, batch=3, kv_heads=2, requires_grad=True)
    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for lengths in LENGTHS:
        seq_lens = torch.tensor(lengths)
        results, expected = compiled(*inputs, seq_lens), call(*inputs, seq_lens)
        torch.testing.assert_close(results, expected, rtol=0, atol=0)
        actual, wanted = (gradients(x, inputs) for x in (results, expected))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("call", [padded, packed])
def test_backends_give_the_same_gradients(
    call: Any, backend: str, device: str, exact: Exact
) -> None:
    inputs = make_qkv(70, batch=3, dtype=exact.dtype, device=device, requires_grad=True)
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for lengths in LENGTHS[:2]:
        seq_lens = torch.tensor(lengths)
        actual, wanted = (gradients(f(*inputs, seq_lens), inputs) for f in (compiled, call))
        torch.testing.assert_close(actual, wanted, rtol=0, atol=exact.backward)


def test_what_lengths_are_too_long_is_said_when_a_program_runs() -> None:
    inputs = make_qkv(70, batch=3)
    compiled = torch.compile(padded, fullgraph=True, backend="aot_eager")
    compiled(*inputs, torch.tensor(LENGTHS[0]))
    for lengths in ([71, 1, 1], [1, 1, 71], [1, -1, 1]):
        with pytest.raises(ValueError, match="sequences"):
            compiled(*inputs, torch.tensor(lengths))
    compiled = torch.compile(
        lambda *x: padded(*x[:3], seq_lens_of_mask(x[3])), fullgraph=True, backend="aot_eager"
    )
    mask = torch.zeros(3, 70, dtype=torch.bool)
    compiled(*inputs, mask)
    mask[1, 30] = True  # a hole
    with pytest.raises(ValueError, match="sequences"):
        compiled(*inputs, mask)


@pytest.mark.parametrize("form", ["seq_lens", "mask"])
def test_multihead_compiles_without_graph_breaks(form: str, device: str, exact: Exact) -> None:
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(32, 4, *BRANCHES, dtype=exact.dtype, device=device)
    x = torch.randn(3, 70, 32, dtype=exact.dtype, device=device)

    def call(x: Tensor, seq_lens: Tensor) -> Tensor:
        if form == "seq_lens":
            out, _ = layer(x, seq_lens=seq_lens)
        else:
            mask = torch.arange(70, device=device) >= seq_lens.to(device)[:, None]
            out, _ = layer(x, key_padding_mask=mask)
        return out

    counter = CompileCounter()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    parameters = list(layer.parameters())
    for lengths in LENGTHS:
        seq_lens = torch.tensor(lengths)
        results = [f(x, seq_lens) for f in (compiled, call)]
        torch.testing.assert_close(*results, rtol=0, atol=10 * exact.forward)
        actual, wanted = (torch.autograd.grad(out.square().sum(), parameters) for out in results)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=100 * exact.backward)
    assert counter.frame_count == 1


def test_nested_tensors_compile() -> None:
    parts = [torch.randn(n, 4, 16, dtype=torch.float64) for n in (5, 33, 70)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        out = dilated_attention(x, x, x, *BRANCHES)
        assert isinstance(out, Tensor)
        return (out + x).values()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(nested) for f in (compiled, call)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    actual, wanted = (torch.autograd.grad(x.square().sum(), nested)[0].values() for x in results)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_exported_programs_take_other_lengths(tmp_path: Any) -> None:
    class Padded(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, seq_lens: Tensor) -> Any:
            return padded(q, k, v, seq_lens)

    q, k, v = make_qkv(70, batch=3)
    lengths = torch.tensor(LENGTHS[0])
    seq_len, batch = torch.export.Dim("seq_len", max=4096), torch.export.Dim("batch", max=64)
    row = {0: batch, 1: seq_len}
    program = torch.export.export(
        Padded(), (q, k, v, lengths), dynamic_shapes=(row, row, row, {0: batch})
    )
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    other = make_qkv(90, batch=2)
    for inputs, given in (((q, k, v), torch.tensor(LENGTHS[1])), (other, torch.tensor([90, 7]))):
        expected = padded(*inputs, given)
        torch.testing.assert_close(loaded(*inputs, given), expected, rtol=0, atol=0)


def test_checkpointing_repeats_dropout() -> None:
    inputs = make_qkv(70, batch=3, requires_grad=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return dilated_attention(
            q, k, v, *BRANCHES, seq_lens=LENGTHS[0], dropout_p=0.4, return_lse=True
        )

    found = []
    for f in (call, lambda *x: checkpoint(call, *x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(gradients(f(*inputs), inputs))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_autocast(device: str) -> None:
    inputs = make_qkv(70, batch=3, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = padded(*inputs, torch.tensor(LENGTHS[0]))
    assert out.dtype is torch.bfloat16 and lse.dtype is torch.float32
    expected, _ = padded(*inputs, torch.tensor(LENGTHS[0]))
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
