"""What torch does with operators: opcheck, gradcheck, torch.compile, autocast, checkpointing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import dilated_attention
from dilated_attention_pytorch.decoding.layout import make_layout
from dilated_attention_pytorch.pattern import Scheme
from tests.conftest import Exact, make_qkv
from tests.ops.blocks import make_query_sums
from tests.ops.calls import run_operator
from tests.planning import Spec, plan_tensor

Sample = tuple[str, tuple[Any, ...], dict[str, Any]]


def samples(device: str, dtype: torch.dtype) -> list[Sample]:
    """One call or more of every operator: (name, arguments, keywords)."""
    q, k, v = make_qkv(
        37, 4, 16, batch=2, kv_heads=2, dtype=dtype, device=device, requires_grad=True
    )
    options: dict[str, Any] = {
        "head_offsets": torch.tensor([[0, 0, 0, 0], [0, 1, -1, 1]]),
        "is_causal": True,
        "scale": 0.3,
        "dropout_p": 0.25,
        "dropout_seed": torch.tensor([11], device=device),
    }
    branches = ([8, 20], [1, 2])
    pattern = plan_tensor(Spec(37, *branches, 4, 2), device)
    plain = tuple(x.detach() for x in (q, k, v))
    out, lse = torch.ops.dilated.attention(*plain, *branches)
    packed = torch.ops.dilated.gather(plain[0], 8, 2).requires_grad_()
    grad_lse = torch.randn_like(lse)
    middle = (plain[0][:, 5:25], plain[1][:, 12:], plain[2][:, 12:], 37, 5, 12)
    middle_pattern = plan_tensor(
        Spec(37, *branches, 4, 2, queries=((5, 25),), keys=((12, 37),)), device
    )
    running = {"out": out[:, 5:25].to(lse.dtype), "lse": lse[:, :, 5:25]}
    final = (out[:, 5:25], lse[:, :, 5:25])
    far_key, near = plain[1][:, :4], plain[1][:, 14:]
    far = (*(x.contiguous() for x in final), middle[0], near, near, far_key, far_key, 37)
    sums, one_head = make_query_sums(middle[0]), plain[0][:, :, :1].contiguous()
    one_head_sums = make_query_sums(one_head)
    places = torch.tensor([[0, 20], [21, 0], [22, 15]])
    lengths, ones = (torch.tensor(x, device=device) for x in ([20, 36], [1, 1]))
    scheme = Scheme.make(*branches, "interleaved", "masked")
    lattices = torch.tensor(make_layout(scheme, 4, 2, 37, grown=False).table, device=device)
    decode = (lengths, lattices, *branches)
    rows = [torch.zeros(2, 60, 16, dtype=dtype, device=device) for _ in "kv"]
    step = [x[:, :1] for x in plain[1:]]
    one_entry = tuple(x[:1] for x in (out, grad_lse, *plain, out, lse))
    backward = (final[0], grad_lse[:, :, 5:25], *middle[:3], *final, *middle[3:])
    return [
        ("attention", (q, k, v, *branches), {}),
        ("attention", (q, k, v, *branches), {"pattern": pattern}),
        ("attention", (q, k, v, *branches), options),
        ("attention", (q, k, v, *branches), {"padding": "zeros"}),
        ("attention", (q[:1], k[:1], v[:1], *branches), {"sequences": places}),
        ("attention", (q[:1], k[:1], v[:1], *branches), {**options, "sequences": places}),
        ("attention_backward", (out, None, *plain, out, lse, *branches), {}),
        ("attention_backward", (*one_entry, *branches), {"sequences": places}),
        ("attention_backward", (out, grad_lse, *plain, out, lse, *branches), {"pattern": pattern}),
        ("attention_block", (*middle, *branches), {}),
        ("attention_block", (*middle, *branches), {"pattern": middle_pattern, "partial": True}),
        ("attention_block", (*middle, *branches), {**options, **running, "padding": "zeros"}),
        ("attention_block_into", (*far, [5, 25], [12, 20, 22, 37], [0, 4], *branches), {}),
        (
            "attention_block_into",
            (*far[:5], None, None, 37, [5, 25], [12, 20, 22, 37], [0, 4], *branches),
            {**options, "rows": "near"},
        ),
        ("attention_block_backward", (*backward, *branches), {}),
        ("attention_block_backward", (*backward, *branches), {**options, "partial": True}),
        ("attention_block_backward_into", (sums, *backward, *branches), {}),
        ("attention_block_backward_into", (sums.clone(), *backward, *branches), options),
        ("make_query_sums", (q,), {}),
        ("round_query_sums", (sums, middle[0]), {"scale": 0.3}),
        ("round_query_sums", (one_head_sums, one_head), {}),
        ("segment_attention", (q, k, v, 16, 3), {}),
        ("segment_attention", (q, k, v, 16, 3), {"padding": "zeros"}),
        ("gather", (q, 8, 3), {"start": 5}),
        ("gather", (q, 8, 3), {"head_offsets": torch.tensor([0, 2, -1, 1])}),
        ("scatter_add", (q, packed, 8, 2), {}),
        ("gather_into", (packed.detach().clone(), plain[0], 8, 2), {}),
        ("scatter_into", (plain[0].clone(), packed.detach(), 8, 2), {"accumulate": True}),
        ("decode_attend", (plain[0][:, :2], *plain[1:], lengths, lattices, *branches, 2), {}),
        ("decode_attend", (plain[0][:, :1], *rows, *decode, 2), {"counts": ones, "scale": 0.3}),
        ("decode_append", (*rows, lengths.clone(), *step, *decode[1:]), {"max_seq_len": 37}),
        ("decode_step", (*rows, lengths.clone(), plain[0][:, :1], *step, *decode[1:]), {}),
        ("vouch", (pattern.clone(), pattern.cpu()), {}),
    ]


@pytest.mark.parametrize("index", range(33))
def test_opcheck(index: int, device: str) -> None:
    everything = samples(device, torch.float32)
    assert len(everything) == 33
    name, arguments, keywords = everything[index]
    torch.library.opcheck(getattr(torch.ops.dilated, name).default, arguments, keywords)


def test_every_operator_has_samples() -> None:
    named = {name for name, _, _ in samples("cpu", torch.float64)}
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name for s in schemas if s.name.startswith("dilated::")}
    # These need a process group: tests/ring/test_compile.py has their samples.
    ring = {"dilated::ring_attention", "dilated::ring_attention_backward"}
    assert registered - ring == {f"dilated::{name}" for name in named}


@pytest.mark.parametrize("outputs", ["out", "lse", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_gradcheck(padding: str, is_causal: bool, outputs: str) -> None:
    inputs = make_qkv(11, 2, 3, kv_heads=1, requires_grad=True)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, lse = torch.ops.dilated.attention(
            *tensors, [4, 8], [1, 2], is_causal=is_causal, padding=padding
        )
        return {"out": (out,), "lse": (lse,), "both": (out, lse)}[outputs]

    assert torch.autograd.gradcheck(function, inputs)


def test_gradcheck_with_dropout() -> None:
    inputs = make_qkv(11, 2, 3, requires_grad=True)
    seed = torch.tensor([4])

    def function(*tensors: Tensor) -> Tensor:
        out: Tensor = torch.ops.dilated.attention(
            *tensors, [4, 8], [1, 2], dropout_p=0.5, dropout_seed=seed
        )[0]
        return out

    assert torch.autograd.gradcheck(function, inputs)


def loss_and_gradients(
    function: Callable[..., Tensor], seq_len: int, device: str
) -> tuple[Tensor, ...]:
    inputs = make_qkv(
        seq_len, 4, 16, kv_heads=2, dtype=torch.float32, device=device, requires_grad=True
    )
    loss = function(*inputs)
    return (loss.detach(), *torch.autograd.grad(loss, inputs))


def weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = torch.ops.dilated.attention(q * 1.5, k, v, [16, 40], [1, 2])
    return (out.sin() * q).sum() + lse.square().sum()


def pass_through_branches(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    packed = torch.ops.dilated.gather(q, 16, 2)
    spread = torch.ops.dilated.scatter_add(q, packed.tanh(), 16, 2)
    out, _ = torch.ops.dilated.segment_attention(spread, k, v, 16, 2)
    return (out * q).sum()


def inductor_missing() -> str | None:
    return None if shutil.which("c++") or shutil.which("g++") else "inductor needs a C++ compiler"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [weigh, pass_through_branches])
def test_compiled_equals_eager(function: Callable[..., Tensor], backend: str, device: str) -> None:
    if backend == "inductor" and (reason := inductor_missing()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected = loss_and_gradients(function, 50, device)
    actual = loss_and_gradients(compiled, 50, device)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_plans_is_kept_out_of_graphs() -> None:
    for name in {name for name, _, _ in samples("cpu", torch.float64)}:
        op = getattr(torch.ops.dilated, name).default
        plans = any(a.name.startswith("segment_length") for a in op._schema.arguments)
        plans = plans and not name.startswith(("gather", "scatter", "decode"))
        assert (torch.Tag.cudagraph_unsafe in op.tags) == plans, name


@pytest.mark.parametrize("function", [weigh, pass_through_branches])
def test_what_plans_runs_between_the_graphs_of_reduce_overhead(
    function: Callable[..., Tensor], device: str
) -> None:
    if (reason := inductor_missing()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for call in range(4):  # on a GPU: two to warm up, a capture, a replay
        torch.manual_seed(call)
        expected = loss_and_gradients(function, 50, device)
        torch.manual_seed(call)
        torch.compiler.cudagraph_mark_step_begin()
        for ours, theirs in zip(loss_and_gradients(compiled, 50, device), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [weigh, pass_through_branches])
def test_one_compilation_serves_all_lengths(function: Callable[..., Tensor], device: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for seq_len in (50, 61, 64, 130, 17):
        expected = loss_and_gradients(function, seq_len, device)
        actual = loss_and_gradients(compiled, seq_len, device)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # One more is allowed: lengths below the first segment's end are another formula in gather.
    assert counter.frame_count <= 2


class Batch(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, places: Tensor) -> Tensor:
        out, lse = torch.ops.dilated.attention(q, k, v, [16, 40], [1, 2], sequences=places)
        return (out * q).sum(-1) + lse[0].mT.exp()


BATCHES = [
    [(0, 20), (20, 30)],
    [(1, 49), (50, 0)],
    [(0, 0), (7, 11)],
    [(0, 25), (25, 25)],
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_compilation_serves_all_batches_of_a_size(backend: str, device: str) -> None:
    if backend == "inductor" and (reason := inductor_missing()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(Batch(), fullgraph=True, backend=counter)
    for places in BATCHES:
        table = torch.tensor(places)
        expected = loss_and_gradients(lambda *x, t=table: Batch()(*x, t).sum(), 50, device)
        actual = loss_and_gradients(lambda *x, t=table: compiled(*x, t).sum(), 50, device)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_one_program_serves_all_batches(strict: bool) -> None:
    rows, count = torch.export.Dim("rows", min=8, max=4096), torch.export.Dim("count", max=4096)
    tensors = make_qkv(50, 4, 16, dtype=torch.float32)
    exported = torch.export.export(
        Batch(),
        (*tensors, torch.tensor(BATCHES[0])),
        dynamic_shapes=(*({1: rows},) * 3, {0: count}),
        strict=strict,
    ).module()
    for places in (*BATCHES, [(0, 10), (11, 12), (30, 20)]):
        table = torch.tensor(places)
        torch.testing.assert_close(exported(*tensors, table), Batch()(*tensors, table))


def test_public_function_compiles(device: str) -> None:
    torch._dynamo.reset()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, [16, 40], [1, 2], head_offsets="blocked", is_causal=True)
        assert isinstance(out, Tensor)
        return (out * q).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(function, 50, device)
    for ours, theirs in zip(loss_and_gradients(compiled, 50, device), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def with_scale_of_head_dim(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q, k, v, [16, 40], [1, 2], scale=q.size(-1) ** -0.5)  # type: ignore[return-value]


def with_scale_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dilated_attention(q, k, v, [16, 40], [1, 2], scale=0.25 * q.size(1) ** 0.1)  # type: ignore[return-value]


def with_segments_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = [16, q.shape[1], q.shape[1] // 2]
    return dilated_attention(q, k, v, lengths, [1, 2, 3], head_offsets="blocked", padding="zeros")  # type: ignore[return-value]


def with_one_segment_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, _ = torch.ops.dilated.segment_attention(
        q, k, v, q.shape[1] // 3, 2, scale=q.size(1) ** -0.1
    )
    spread: Tensor = torch.ops.dilated.gather(q, q.shape[1], 2)
    return out + spread[:, :1]


SYMBOLIC = [
    with_scale_of_head_dim,
    with_scale_of_length,
    with_segments_of_length,
    with_one_segment_of_length,
]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", SYMBOLIC)
def test_symbolic_arguments_give_one_graph_for_all_lengths(
    function: Callable[..., Tensor], backend: str, device: str
) -> None:
    if backend == "inductor" and (reason := inductor_missing()) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for seq_len in (50, 61, 64, 130, 17):
        expected = loss_and_gradients(lambda *x: function(*x).square().sum(), seq_len, device)
        actual = loss_and_gradients(lambda *x: compiled(*x).square().sum(), seq_len, device)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len([graph for graph in counter.graphs if len(graph.graph.nodes) > 0]) == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("function", SYMBOLIC)
def test_symbolic_arguments_give_one_program_for_all_lengths(
    function: Callable[..., Tensor], strict: bool
) -> None:
    class Program(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(q, k, v)

    length = torch.export.Dim("length", min=8, max=4096)
    tensors = make_qkv(40, 4, 16, dtype=torch.float32)
    exported = torch.export.export(
        Program(), tensors, dynamic_shapes=({1: length},) * 3, strict=strict
    ).module()
    for seq_len in (40, 57, 130):
        tensors = make_qkv(seq_len, 4, 16, dtype=torch.float32)
        torch.testing.assert_close(exported(*tensors), function(*tensors))


def test_scale_as_an_argument_compiles_once_dynamic(device: str) -> None:
    torch._dynamo.reset()

    def function(q: Tensor, scale: float) -> Tensor:
        out = dilated_attention(q, q, q, [16], [1], scale=scale)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    q, _, _ = make_qkv(40, 4, 16, dtype=torch.float32, device=device)
    for scale in (0.3, 0.5):
        torch.testing.assert_close(compiled(q, scale), function(q, scale))


def test_a_symbolic_scale_is_checked_when_it_has_a_value(device: str) -> None:
    torch._dynamo.reset()

    def function(q: Tensor) -> Tensor:
        out = dilated_attention(q, q, q, [16], [1], scale=1e37 * q.size(1))
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    short, long = (torch.zeros(1, n, 4, 16, device=device) for n in (20, 40))
    torch.testing.assert_close(compiled(short), function(short))
    with pytest.raises(ValueError, match="scale: must be finite in float32, got 4e"):
        compiled(long)


def test_fake_calls_take_a_table_on_the_host_beside_tensors_on_a_gpu() -> None:
    with FakeTensorMode():
        q = torch.empty(2, 37, 4, 16, device="cuda")
        table = torch.zeros(2, 4, dtype=torch.int64)
        out, lse = torch.ops.dilated.attention(q, q, q, [8, 20], [1, 2], head_offsets=table)
        grads = torch.ops.dilated.attention_backward(
            out, None, q, q, q, out, lse, [8, 20], [1, 2], head_offsets=table
        )
        block = torch.ops.dilated.attention_block(
            q, q, q, 74, 37, 0, [8, 20], [1, 2], head_offsets=table
        )
        packed = torch.ops.dilated.gather(q, 8, 2, head_offsets=table[1])
        spread = torch.ops.dilated.scatter_add(q, packed, 8, 2, head_offsets=table[1])
        torch.ops.dilated.gather_into(packed, q, 8, 2, head_offsets=table[1])
        torch.ops.dilated.scatter_into(spread, packed, 8, 2, head_offsets=table[1])
        one, _ = torch.ops.dilated.segment_attention(q, q, q, 20, 2, head_offsets=table[1:])
        first = torch.empty(1, 37, 4, 16, device="cuda")
        both = {"head_offsets": table, "sequences": torch.tensor([[0, 20], [20, 17]])}
        batch = torch.ops.dilated.attention(first, first, first, [8, 20], [1, 2], **both)
        ring = torch.ops.dilated.ring_attention(
            q, q, q, [8, 20], [1, 2], "a group", head_offsets=table
        )
        shares = torch.ops.dilated.ring_attention_backward(
            out, None, q, q, q, out, lse, [8, 20], [1, 2], "a group", head_offsets=table
        )
        for tensor in (out, lse, *grads, *block, *batch, packed, spread, one, *ring, *shares):
            assert tensor.device.type == "cuda"
        with pytest.raises(ValueError, match="head_offsets: must be"):
            torch.ops.dilated.attention(q, q, q, [8], [1], head_offsets=table)
        group = ([8, 20], [1, 2], "a group")
        ring, _ = torch.ops.dilated.ring_attention(first, first, first, *group, **both)
        assert ring.shape == first.shape
        with pytest.raises(ValueError, match="query: must be .* where sequences are given"):
            torch.ops.dilated.ring_attention(q, q, q, *group, sequences=both["sequences"])


def test_meta_tensors_give_shapes_without_computing() -> None:
    q = torch.empty(2, 10**7, 12, 64, device="meta", dtype=torch.bfloat16)
    out, lse = torch.ops.dilated.attention(q, q, q, [2048, 4096], [1, 2])
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (2, 12, 10**7) and lse.dtype == torch.float32
    block = torch.ops.dilated.attention_block(
        q[:, :50], q, q, 10**7, 0, 0, [2048], [1], partial=True
    )
    assert block[0].shape == (2, 50, 12, 64) and block[0].dtype == torch.float32
    packed = torch.ops.dilated.gather(q, 2048, 3)
    pieces, rest = divmod(10**7, 2048)
    assert packed.shape == (2, pieces * 683 + -(-rest // 3), 12, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_inputs_and_gradients_back(dtype: torch.dtype, device: str) -> None:
    inputs = make_qkv(50, 4, 16, dtype=torch.float32, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        out, lse = torch.ops.dilated.attention(*inputs, [16, 32], [1, 2])
        one_branch, _ = torch.ops.dilated.segment_attention(*inputs, 16, 1)
    assert out.dtype == one_branch.dtype == dtype and lse.dtype == torch.float32
    direct = run_operator(
        tuple(x.detach().to(dtype) for x in inputs), [16, 32], [1, 2], with_grad_lse=False
    )
    assert torch.equal(out.detach(), direct.out)
    out.float().square().sum().backward()
    for x in inputs:
        assert x.grad is not None and x.grad.dtype == torch.float32 and x.grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant: bool, device: str, exact: Exact) -> None:
    inputs = make_qkv(50, 4, 16, dtype=exact.dtype, device=device, requires_grad=True)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = dilated_attention(q, k, v, [16, 32], [1, 2], dropout_p=0.3)
        assert isinstance(out, Tensor)
        return out.square()

    torch.manual_seed(0)
    plain = function(*inputs)
    expected = torch.autograd.grad(plain.sum(), inputs)
    torch.manual_seed(0)
    kept = checkpoint(function, *inputs, use_reentrant=use_reentrant)
    torch.testing.assert_close(kept, plain, rtol=0, atol=0)
    kept.sum().backward()
    for x, theirs in zip(inputs, expected, strict=True):
        assert x.grad is not None and torch.equal(x.grad, theirs)


def test_vmap_over_the_batch_is_refused_or_right() -> None:
    q, k, v = (x[:, None] for x in make_qkv(20, 2, 8, batch=3))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.dilated.attention(q, k, v, [8], [1])[0]
        return out

    expected = torch.stack([function(*x) for x in zip(q, k, v, strict=True)])
    try:
        actual = torch.vmap(function)(q, k, v)
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(actual, expected)
