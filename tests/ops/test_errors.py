"""Bad input: a ValueError that names the argument, says what must hold and what was given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_attention_pytorch import _C
from dilated_attention_pytorch.pattern import Pattern, PatternSpec, Sequences, make_branches
from tests.conftest import make_qkv
from tests.planning import Spec, plan_tensor

GOOD: dict[str, Any] = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def good_tensors() -> dict[str, Any]:
    q, k, v = make_qkv(24, 4, 16, batch=2, kv_heads=2, dtype=torch.float32)
    return {"query": q, "key": k, "value": v}


# what is changed; the argument that the message names; what it says was given
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "query of three dimensions": ({"query": rows(24, 4, 16)}, "query", "3"),
    "key of five dimensions": ({"key": rows(1, 2, 24, 2, 16)}, "key", "5"),
    "value of two dimensions": ({"value": rows(24, 16)}, "value", "2"),
    "integer query": (
        {name: rows(2, 24, 2, 16, dtype=torch.int32) for name in ("query", "key", "value")},
        "query",
        "int32",
    ),
    "key of another dtype": ({"key": rows(2, 24, 2, 16).half()}, "key", "float16"),
    "value of another dtype": ({"value": rows(2, 24, 2, 16).double()}, "value", "float64"),
    "value on another device": ({"value": rows(2, 24, 2, 16).to("meta")}, "value", "meta"),
    "key of another batch": ({"key": rows(3, 24, 2, 16)}, "key", "3, 24"),
    "key of another length": ({"key": rows(2, 25, 2, 16)}, "key", "25"),
    "key of another head_dim": ({"key": rows(2, 24, 2, 8)}, "key", "8"),
    "value of another head_dim": ({"value": rows(2, 24, 2, 8)}, "value", "8"),
    "value of other heads": ({"value": rows(2, 24, 4, 16)}, "value", "4"),
    "heads that do not divide": (
        {"key": rows(2, 24, 3, 16), "value": rows(2, 24, 3, 16)},
        "key",
        "3",
    ),
    "more KV heads than heads": (
        {"key": rows(2, 24, 8, 16), "value": rows(2, 24, 8, 16)},
        "key",
        "8",
    ),
    "no heads": (
        {name: rows(2, 24, 0, 16) for name in ("query", "key", "value")},
        "heads",
        "0",
    ),
    "head_dim of 0": (
        {name: rows(2, 24, 4, 0) for name in ("query", "key", "value")},
        "head_dim",
        "0",
    ),
    "head_dim of 512": (
        {name: rows(2, 24, 4, 512) for name in ("query", "key", "value")},
        "head_dim",
        "512",
    ),
    "unequal lists": ({"dilation_rates": [1]}, "dilation_rates", "2 and 1"),
    "no branches": ({"segment_lengths": [], "dilation_rates": []}, "segment_lengths", "empty"),
    "segment of 0": ({"segment_lengths": [0, 16]}, "segment_lengths", "0"),
    "negative segment": ({"segment_lengths": [8, -16]}, "segment_lengths", "-16"),
    "rate of 0": ({"dilation_rates": [1, 0]}, "dilation_rates", "0"),
    "negative rate": ({"dilation_rates": [-3, 2]}, "dilation_rates", "-3"),
    "offset as large as its rate": (
        {"head_offsets": torch.tensor([[0] * 4, [0, 1, 2, 0]])},
        "head_offsets",
        "2",
    ),
    "offset below -1": (
        {"head_offsets": torch.tensor([[0] * 4, [0, 1, -2, 0]])},
        "head_offsets",
        "-2",
    ),
    "offsets of too few heads": (
        {"head_offsets": torch.zeros(2, 3, dtype=torch.int64)},
        "head_offsets",
        "2, 3",
    ),
    "offsets of one dimension": (
        {"head_offsets": torch.zeros(8, dtype=torch.int64)},
        "head_offsets",
        "8",
    ),
    "offsets of another dtype": (
        {"head_offsets": torch.zeros(2, 4, dtype=torch.int32)},
        "head_offsets",
        "int32",
    ),
    "dropout of 1": ({"dropout_p": 1.0, "dropout_seed": torch.tensor([1])}, "dropout_p", "1"),
    "negative dropout": (
        {"dropout_p": -0.5, "dropout_seed": torch.tensor([1])},
        "dropout_p",
        "-0.5",
    ),
    "dropout of nan": (
        {"dropout_p": float("nan"), "dropout_seed": torch.tensor([1])},
        "dropout_p",
        "nan",
    ),
    "dropout without seed": ({"dropout_p": 0.5}, "dropout_seed", "None"),
    "seed of another dtype": (
        {"dropout_p": 0.5, "dropout_seed": torch.tensor([1.0])},
        "dropout_seed",
        "float32",
    ),
    "two seeds": ({"dropout_p": 0.5, "dropout_seed": torch.tensor([1, 2])}, "dropout_seed", "2"),
    "unknown padding": ({"padding": "reflect"}, "padding", "reflect"),
    "sequences in a batch of two": (
        {"sequences": torch.tensor([[0, 24]])},
        "query: must be [1, rows, heads, head_dim]",
        "2, 24",
    ),
    "pattern of another dtype": (
        {"pattern": torch.zeros(64, dtype=torch.int64)},
        "pattern",
        "int64",
    ),
    "pattern of two dimensions": (
        {"pattern": torch.zeros(8, 8, dtype=torch.int32)},
        "pattern",
        "8, 8",
    ),
    "pattern that is too short": ({"pattern": torch.zeros(3, dtype=torch.int32)}, "pattern", "3"),
    "pattern of zeros": ({"pattern": torch.zeros(500, dtype=torch.int32)}, "pattern", "checksum"),
}


def call(arguments: dict[str, Any]) -> Any:
    arguments = {**good_tensors(), **GOOD, **arguments}
    positional = [arguments.pop(name) for name in ("query", "key", "value", *GOOD)]
    return torch.ops.dilated.attention(*positional, **arguments)


def test_the_unchanged_call_is_good() -> None:
    call({})
    call({"pattern": plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2))})


@pytest.mark.parametrize("name", CASES)
def test_attention_names_what_is_wrong(name: str) -> None:
    change, named, given = CASES[name]
    with pytest.raises(ValueError) as caught:
        call(change)
    message = str(caught.value)
    assert named in message, message
    assert given in message, message


def test_truncated_pattern_is_refused() -> None:
    words = plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2))
    with pytest.raises(ValueError, match="pattern"):
        call({"pattern": words[:-4].contiguous()})


def test_no_bit_of_a_pattern_may_differ() -> None:
    words = plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2))
    for word in range(len(words)):
        for bit in (word % 31, 31):
            spoiled = words.clone()
            spoiled[word] ^= 1 << bit if bit < 31 else -(2**31)
            with pytest.raises(ValueError, match="pattern: must"):
                call({"pattern": spoiled})


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_a_pattern_is_compared_again_after_a_write(mode: Callable[[], Any]) -> None:
    with mode():
        words = plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2)).clone()
        for _ in range(2):
            call({"pattern": words})
            words[100] += 1
            with pytest.raises(ValueError, match="pattern: .*checksum"):
                call({"pattern": words})
            words[100] -= 1
        call({"pattern": words})


def test_a_pattern_in_freed_memory_is_refused() -> None:
    words = plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2)).clone()
    call({"pattern": words})
    words.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="pattern: must have memory of"):
        call({"pattern": words})


def test_float64_on_cuda_is_refused(device: str) -> None:
    if device == "cpu":
        tensors = make_qkv(8, 2, 16)
        assert torch.ops.dilated.attention(*tensors, [8], [1])[0].dtype == torch.float64
        return
    tensors = make_qkv(8, 2, 16, device=device)
    with pytest.raises(ValueError, match="float64"):
        torch.ops.dilated.attention(*tensors, [8], [1])


@pytest.mark.parametrize(
    ("change", "named", "given"),
    [
        ({"grad_out": rows(2, 24, 4, 8)}, "grad_out", "8"),
        ({"grad_out": rows(2, 24, 4, 16).double()}, "grad_out", "float64"),
        ({"grad_lse": rows(2, 24, 4)}, "grad_lse", "2, 24, 4"),
        ({"out": rows(2, 24, 2, 16)}, "out", "2, 24, 2"),
        ({"grad_lse": rows(2, 4, 24).half()}, "grad_lse", "float16"),
        ({"grad_lse": rows(2, 4, 24, dtype=torch.complex64)}, "grad_lse", "complex64"),
        ({"lse": rows(2, 4, 23)}, "lse", "23"),
        ({"lse": rows(2, 4, 24).to("meta")}, "lse", "meta"),
        ({"out": rows(2, 24, 4, 16).to("meta")}, "out", "meta"),
    ],
)
def test_backward_names_what_is_wrong(change: dict[str, Any], named: str, given: str) -> None:
    tensors = good_tensors()
    out, lse = call({})
    good = {"grad_out": torch.ones_like(out), "grad_lse": None, **tensors, "out": out, "lse": lse}
    arguments = {**good, **change}
    branches = ([8, 16], [1, 2])
    torch.ops.dilated.attention_backward(*good.values(), *branches)
    with pytest.raises(ValueError, match=named) as caught:
        torch.ops.dilated.attention_backward(*arguments.values(), *branches)
    assert given in str(caught.value)


def block_call(**change: Any) -> Any:
    """Queries 4 .. 11 against keys 6 .. 15 of 24 positions."""
    q, k, v = good_tensors().values()
    tensors = {"query": q[:, 4:12], "key": k[:, 6:16], "value": v[:, 6:16]}
    arguments = {**tensors, "seq_len": 24, "queries": 4, "keys": 6, **GOOD, **change}
    positional = [arguments.pop(name) for name in (*tensors, "seq_len", "queries", "keys", *GOOD)]
    return torch.ops.dilated.attention_block(*positional, **arguments)


@pytest.mark.parametrize(
    ("change", "named", "given"),
    [
        ({"seq_len": -1}, "seq_len", "-1"),
        ({"seq_len": 2**31}, "seq_len", str(2**31)),
        ({"seq_len": 15}, "keys", "15"),
        ({"queries": -1}, "queries", "-1"),
        ({"queries": 17}, "queries", "queries 17, rows 8, seq_len 24"),
        ({"queries": 2**62}, "queries", str(2**62)),
        ({"keys": -2}, "keys", "-2"),
        ({"keys": 15}, "keys", "keys 15, rows 10, seq_len 24"),
        ({"value": rows(2, 9, 2, 16)}, "value", "9"),
        ({"key": rows(1, 10, 2, 16)}, "key", "1, 10"),
        ({"out": rows(2, 8, 4, 16)}, "out and lse", "out alone"),
        ({"lse": rows(2, 4, 8)}, "out and lse", "lse alone"),
        ({"out": rows(2, 9, 4, 16), "lse": rows(2, 4, 8)}, "out", "2, 9"),
        ({"out": rows(2, 8, 4, 16).half(), "lse": rows(2, 4, 8)}, "out", "float16"),
        ({"out": rows(2, 8, 4, 16), "lse": rows(2, 4, 9)}, "lse", "9"),
        ({"out": rows(2, 8, 4, 16), "lse": rows(2, 4, 8).double()}, "lse", "float64"),
        ({"out": rows(2, 8, 4, 16).to("meta"), "lse": rows(2, 4, 8)}, "out", "meta"),
        ({"pattern": plan_tensor(Spec(24, [8, 16], [1, 2], 4, 2))}, "pattern", "ranges"),
        ({"head_offsets": torch.zeros(2, 3, dtype=torch.int64)}, "head_offsets", "2, 3"),
        ({"padding": "reflect"}, "padding", "reflect"),
        ({"dilation_rates": [1, 0]}, "dilation_rates", "0"),
        ({"sequences": torch.tensor([[0, 24]])}, "query: must be .* where sequences", "2, 8"),
    ],
)
def test_block_names_what_is_wrong(change: dict[str, Any], named: str, given: str) -> None:
    block_call()
    block_call(out=rows(2, 8, 4, 16), lse=rows(2, 4, 8))
    with pytest.raises(ValueError, match=named) as caught:
        block_call(**change)
    assert given in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named", "given"),
    [
        ({"out": rows(2, 8, 4, 16).double()}, "out", "float64"),
        ({"grad_out": rows(2, 7, 4, 16)}, "grad_out", "7"),
        ({"lse": rows(2, 4, 24)}, "lse", "24"),
        ({"keys": 15}, "keys", "15"),
    ],
)
def test_block_backward_names_what_is_wrong(change: dict[str, Any], named: str, given: str) -> None:
    q, k, v = good_tensors().values()
    out, lse = block_call()
    good = {"grad_out": out, "grad_lse": None, "query": q[:, 4:12], "key": k[:, 6:16]}
    good |= {"value": v[:, 6:16], "out": out, "lse": lse}
    good |= {"seq_len": 24, "queries": 4, "keys": 6, **GOOD}
    torch.ops.dilated.attention_block_backward(*good.values())
    with pytest.raises(ValueError, match=named) as caught:
        torch.ops.dilated.attention_block_backward(*{**good, **change}.values())
    assert given in str(caught.value)


@pytest.mark.parametrize(
    ("sums", "given"),
    [
        (rows(2, 8, 4, 16), "2, 8, 4, 16"),
        (rows(2, 4, 8, 15), "2, 4, 8, 15"),
        (rows(2, 4, 8, 16).half(), "float16"),
        (rows(2, 4, 8, 16).to("meta"), "meta"),
        (rows(2, 8, 4, 16).transpose(1, 2), "strides"),
    ],
)
def test_query_sums_must_fit(sums: torch.Tensor, given: str) -> None:
    q, k, v = good_tensors().values()
    out, lse = block_call()
    block = (out, None, q[:, 4:12], k[:, 6:16], v[:, 6:16], out, lse, 24, 4, 6, *GOOD.values())
    good = rows(2, 4, 8, 16)
    torch.ops.dilated.attention_block_backward_into(good, *block)
    assert torch.ops.dilated.round_query_sums(good, out).shape == out.shape
    for call in (
        lambda: torch.ops.dilated.attention_block_backward_into(sums, *block),
        lambda: torch.ops.dilated.round_query_sums(sums, out),
    ):
        with pytest.raises(ValueError, match="grad_query_sums") as caught:
            call()
        assert given in str(caught.value)


def test_query_sums_are_not_differentiable() -> None:
    q, k, v = good_tensors().values()
    out, lse = block_call()
    tensors = {"grad_query_sums": rows(2, 4, 8, 16), "grad_out": out, "grad_lse": lse}
    tensors |= {"query": q[:, 4:12], "key": k[:, 6:16], "value": v[:, 6:16], "out": out, "lse": lse}
    for name in tensors:
        given = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        given[name].requires_grad_()
        call = (*given.values(), 24, 4, 6, *GOOD.values())
        with pytest.raises(RuntimeError, match=f"^{name}: must not require a gradient, got"):
            torch.ops.dilated.attention_block_backward_into(*call)
        with torch.no_grad():
            torch.ops.dilated.attention_block_backward_into(*call)


@pytest.mark.parametrize(
    ("operator", "arguments", "keywords", "named", "given"),
    [
        ("gather", (rows(24, 4, 16), 8, 2), {}, "input", "3"),
        ("gather", (rows(1, 24, 4, 16).int(), 8, 2), {}, "input", "int32"),
        ("gather", (rows(1, 24, 4, 16), 0, 2), {}, "segment_length", "0"),
        ("gather", (rows(1, 24, 4, 16), 8, -2), {}, "dilation_rate", "-2"),
        ("gather", (rows(1, 24, 4, 16), 8, 2), {"start": -1}, "start", "-1"),
        (
            "gather",
            (rows(1, 24, 4, 16), 8, 2),
            {"head_offsets": torch.tensor([0, 1, 2, 0])},
            "head_offsets",
            "2",
        ),
        (
            "gather",
            (rows(1, 24, 4, 16), 8, 2),
            {"head_offsets": torch.tensor([0, 1])},
            "head_offsets",
            "2",
        ),
        ("scatter_add", (rows(1, 24, 4, 16), rows(1, 13, 4, 16), 8, 2), {}, "packed", "13"),
        (
            "scatter_add",
            (rows(1, 24, 4, 16), rows(1, 12, 4, 16).half(), 8, 2),
            {},
            "packed",
            "float16",
        ),
        (
            "segment_attention",
            (rows(1, 24, 4, 16),) * 3 + (0, 2),
            {},
            "segment_length",
            "0",
        ),
        (
            "segment_attention",
            (rows(1, 24, 4, 16),) * 3 + (8, 0),
            {},
            "dilation_rate",
            "0",
        ),
    ],
)
def test_branch_operators_name_what_is_wrong(
    operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any], named: str, given: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        getattr(torch.ops.dilated, operator)(*arguments, **keywords)
    assert given in str(caught.value)


def test_arguments_on_another_device_are_refused(device: str) -> None:
    q, k, v = make_qkv(24, 4, 16, dtype=torch.float32, device=device)
    elsewhere = "meta" if device == "cpu" else "cpu"
    seed = torch.tensor([1]).to(elsewhere)
    with pytest.raises(ValueError, match="dropout_seed"):
        torch.ops.dilated.attention(q, k, v, [8], [1], dropout_p=0.5, dropout_seed=seed)
    pattern = plan_tensor(Spec(24, [8], [1], 4)).to(elsewhere)
    with pytest.raises(ValueError, match="pattern"):
        torch.ops.dilated.attention(q, k, v, [8], [1], pattern=pattern)
    table = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="head_offsets"):
        torch.ops.dilated.attention(q, k, v, [8], [1], head_offsets=table)
    if device == "cuda":
        with pytest.raises(ValueError, match="query|pattern"):
            torch.ops.dilated.attention(
                q.cpu(), k.cpu(), v.cpu(), [8], [1], pattern=pattern.to(device)
            )


@pytest.mark.parametrize(
    ("lengths", "rates", "named"),
    [([3, 4], [1], "dilation_rates"), ([0], [1], "segment_lengths"), ([4], [-1], "dilation_rates")],
)
def test_fake_calls_are_checked_too(lengths: list[int], rates: list[int], named: str) -> None:
    x = torch.empty(1, 8, 2, 4, device="meta")
    with pytest.raises(ValueError, match=named):
        torch.ops.dilated.attention(x, x, x, lengths, rates)


def test_fake_scatter_add_wants_the_shape_that_gather_gives() -> None:
    x = torch.empty(1, 10, 2, 4, device="meta")
    packed = torch.ops.dilated.gather(x, 10, 2)
    assert torch.ops.dilated.scatter_add(x, packed, 10, 2).shape == x.shape
    with pytest.raises(ValueError, match="packed"):
        torch.ops.dilated.scatter_add(x, packed[:, :3], 10, 2)


def every_operator() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A good call of each: the operator, and its arguments by name."""
    x = rows(1, 24, 4, 16)
    qkv = {"query": x, "key": x, "value": x}
    results = {"out": x, "lse": rows(1, 4, 24)}
    backward = {"grad_out": x, "grad_lse": rows(1, 4, 24), **qkv, **results}
    where = {"seq_len": 24, "queries": 0, "keys": 0}
    sums = {"grad_query_sums": rows(1, 4, 24, 16)}
    branch = {"segment_length": 24, "dilation_rate": 2}
    packed = rows(1, 12, 4, 16)
    calls: dict[str, dict[str, Any]] = {
        "attention": {**qkv, **GOOD},
        "attention_backward": {**backward, **GOOD},
        "attention_block": {**qkv, **where, **GOOD},
        "attention_block_into": {
            **{"out": x.clone(), "lse": rows(1, 4, 24), **qkv, "far_key": x, "far_value": x},
            **{**where, "seq_len": 48, "far_keys": 24},
            **GOOD,
        },
        "attention_block_backward": {**backward, **where, **GOOD},
        "attention_block_backward_into": {**sums, **backward, **where, **GOOD},
        "make_query_sums": {"query": x},
        "round_query_sums": {**sums, "query": x},
        "segment_attention": {**qkv, **branch},
        "gather": {"input": x, **branch},
        "scatter_add": {"input": x, "packed": packed, **branch},
        "gather_into": {"packed": packed, "input": x, **branch},
        "scatter_into": {"rows": x.clone(), "packed": packed, **branch},
    }
    return {name: (getattr(torch.ops.dilated, name).default, call) for name, call in calls.items()}


def taking(argument: str) -> list[str]:
    """The operators that have the argument."""
    return [
        name
        for name, (op, _) in every_operator().items()
        if argument in {a.name for a in op._schema.arguments}
    ]


@pytest.mark.parametrize("name", every_operator())
def test_missing_tensors_are_named(name: str) -> None:
    op, call = every_operator()[name]
    op(**call)
    tensors = [key for key, value in call.items() if isinstance(value, Tensor)]
    for missing in set(tensors) - {"grad_lse"}:
        others = [key for key in tensors if key != missing]
        if not others:
            continue  # the dispatcher has nothing to go by
        for with_gradient in (False, True):
            given = {**call, missing: None}
            if with_gradient and not name.endswith(("into", "backward", "block", "sums")):
                given[others[0]] = given[others[0]].clone().requires_grad_()
            with pytest.raises(ValueError, match=f"^{missing}: must be a tensor, got None"):
                op(**given)


@pytest.mark.parametrize("name", every_operator())
def test_freed_memory_is_named(name: str) -> None:
    op, call = every_operator()[name]
    for key, value in call.items():
        if isinstance(value, Tensor):
            freed = value.clone()
            freed.untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=f"^{key}: must have memory.*got 0"):
                op(**{**call, key: freed})


@pytest.mark.parametrize("name", taking("head_offsets"))
def test_tables_that_the_host_cannot_read_are_refused(name: str) -> None:
    op, call = every_operator()[name]
    shape = (4,) if name.startswith(("gather", "scatter")) else (1, 4)
    if "segment_lengths" in call:
        shape = (2, 4)
    op(**call, head_offsets=torch.zeros(shape, dtype=torch.int64))
    table = torch.zeros(shape, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="^head_offsets: must be .* on the CPU, got int64 on meta"):
        op(**call, head_offsets=table)
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in call.items()}
        on_gpu = torch.zeros(shape, dtype=torch.int64, device="cuda")
        with pytest.raises(ValueError, match="^head_offsets: must be .*on the CPU, got .*cuda"):
            op(**fakes, head_offsets=on_gpu)


def places(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs)


@pytest.mark.parametrize(
    ("table", "rule", "given"),
    [
        (places((0, 4)).int(), r"be an int64 tensor \[sequences, 2\] on the CPU", "int32 on cpu"),
        (places((0, 4)).to("meta"), r"be an int64 tensor \[sequences, 2\]", "int64 on meta"),
        (torch.tensor([0, 4]), r"be \[sequences, 2\]", "2"),
        (torch.tensor([[0, 4, 5]]), r"be \[sequences, 2\]", "1, 3"),
        (places((0, 9), (9, -2)), "have lengths of at least 0", "-2 at index 1"),
        (places((0, 9), (8, 2)), "ascend and not overlap", "begins at 8 at index 1"),
        (places((-3, 9)), "ascend and not overlap", "begins at -3 at index 0"),
        (places((9, 2), (0, 9)), "ascend and not overlap", "begins at 0 at index 1"),
        (places((0, 9), (9, 16)), "end within the 24 rows", "length 16 at index 1"),
        (places((25, 0)), "end within the 24 rows", "first row 25, length 0"),
    ],
)
@pytest.mark.parametrize("is_backward", [False, True])
def test_sequences_are_checked(is_backward: bool, table: Tensor, rule: str, given: str) -> None:
    name = "attention_backward" if is_backward else "attention"
    op, call = every_operator()[name]
    one_entry = {k: v[:1] if isinstance(v, Tensor) else v for k, v in call.items()}
    for sequences in (None, places((0, 9), (10, 0), (20, 4)), torch.zeros(0, 2).long()):
        op(**one_entry, sequences=sequences)
    with pytest.raises(ValueError, match=f"^sequences: must {rule}.*{given}"):
        op(**one_entry, sequences=table)


def test_a_pattern_is_of_the_sequences_of_the_call() -> None:
    q, k, v = (x[:1] for x in good_tensors().values())
    pattern = Pattern.plan(
        PatternSpec(
            24, make_branches(*GOOD.values()), "interleaved", 4, 2, sequences=Sequences([(0, 9)])
        )
    ).words
    options = {"pattern": pattern, "sequences": places((0, 9))}
    torch.ops.dilated.attention(q, k, v, *GOOD.values(), **options)
    for table in (None, places((0, 10)), places((1, 9)), places((0, 9), (9, 0))):
        with pytest.raises(ValueError, match=r"^pattern: must be planned for .*sequences"):
            torch.ops.dilated.attention(q, k, v, *GOOD.values(), pattern=pattern, sequences=table)


@pytest.mark.parametrize("name", taking("scale"))
def test_scales_that_are_not_finite_where_they_are_used_are_refused(name: str) -> None:
    op, call = every_operator()[name]
    op(**call, scale=torch.finfo(torch.float32).max)
    for scale in (float("nan"), float("inf"), -float("inf"), 1e39):
        with pytest.raises(ValueError, match="^scale: must be finite in float32, got "):
            op(**call, scale=scale)
    for scale in (1j, True):
        with pytest.raises(ValueError, match="^scale: must be a real number, got "):
            op(**call, scale=scale)
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in call.items()}
    op(**doubles, scale=1e39)


@pytest.mark.parametrize("name", taking("start"))
def test_the_end_of_the_rows_is_bounded(name: str) -> None:
    op, call = every_operator()[name]
    call = {**call, "segment_length": 2**62}
    op(**call, start=2**31 - 25)
    for start in (2**31 - 24, 2**62 - 5, 2**63 - 5):
        with pytest.raises(
            ValueError,
            match=rf"^start: must be .* below 2\^31 with the rows added, got start {start}",
        ):
            op(**call, start=start)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (24, 4, 16)])
@pytest.mark.parametrize("name", taking("input") + ["scatter_into"])
def test_rows_of_another_rank_are_refused(name: str, shape: tuple[int, ...]) -> None:
    op, call = every_operator()[name]
    argument = "rows" if name == "scatter_into" else "input"
    for x in (rows(*shape), rows(*shape).requires_grad_()):
        with torch.set_grad_enabled(not name.endswith("into")):
            message = rf"^{argument}: must be \[batch, seq_len.*got {len(shape)} dimensions"
            with pytest.raises(ValueError, match=message):
                op(**{**call, argument: x})


def test_what_is_written_shares_no_memory_with_what_is_read() -> None:
    op = torch.ops.dilated
    x = rows(1, 64, 4, 16)
    with pytest.raises(ValueError, match="^packed: must not share memory with input"):
        op.gather_into(x[:, 8:24], x[:, :32], 32, 2)
    with pytest.raises(ValueError, match="^rows: must not share memory with packed"):
        op.scatter_into(x[:, :32], x[:, 8:24], 32, 2)
    fused = rows(2, 24, 2, 4, 16)
    op.gather_into(fused[:, :12, 0], fused[:, :, 1], 24, 2)
    call, arguments = every_operator()["attention_block_backward_into"]
    sums = arguments["grad_query_sums"]
    shared = {"grad_out": sums.view(1, 24, 4, 16), "query": sums.view(1, 24, 4, 16)}
    for name, tensor in {**shared, "lse": sums.flatten()[:96].view(1, 4, 24)}.items():
        with pytest.raises(ValueError, match=f"^grad_query_sums: must not share .* with {name}"):
            call(**{**arguments, name: tensor})


@pytest.mark.parametrize("strides", [(768, 20, 16, 1), (768, 0, 16, 1), (0, 64, 4, 1)])
def test_what_is_written_has_a_place_for_each_element(strides: tuple[int, ...]) -> None:
    place = torch.as_strided(rows(4096), (2, 12, 4, 16), strides)
    with pytest.raises(ValueError, match="^packed: must have a place of its own for every element"):
        torch.ops.dilated.gather_into(place, rows(2, 24, 4, 16), 24, 2)
    with pytest.raises(ValueError, match="^rows: must have a place of its own for every element"):
        torch.ops.dilated.scatter_into(place, rows(2, 6, 4, 16), 12, 2)
    apart = rows(2, 4, 12, 32).transpose(1, 2)[..., :16]
    torch.ops.dilated.gather_into(apart, rows(2, 24, 4, 16), 24, 2)


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    """Each of these would take gigabytes, or never end."""
    one = rows(1)
    long = one.expand(1, 2**31 - 1, 1, 256)
    with pytest.raises(
        ValueError, match=r"^query: seq_len must be .* below 2\^31 - 1, got 2147483647"
    ):
        torch.ops.dilated.attention(long, long, long, [8], [1])
    wide = one.expand(0, 8, 2**33, 8)
    with pytest.raises(ValueError, match=r"^query: heads must be .* below 2\^16, got 8589934592"):
        torch.ops.dilated.attention(wide, wide, wide, [8], [1])
    with pytest.raises(ValueError, match="^packed: must have the shape that gather gives"):
        torch.ops.dilated.scatter_add(one.expand(2**31, 64, 1, 64), one.expand(1, 1, 1, 1), 8, 2)
    huge = one.expand(1, 2**30, 4, 256)
    for lengths, rates, named in (([0], [1], "segment_lengths"), ([8], [0], "dilation_rates")):
        with pytest.raises(ValueError, match=f"^{named}: must be positive"):
            torch.ops.dilated.attention(huge, huge, huge, lengths, rates)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.complex64])
def test_query_sums_are_rounded_to_a_dtype_of_queries_only(dtype: torch.dtype) -> None:
    query = rows(1, 24, 4, 16, dtype=dtype)
    with pytest.raises(ValueError, match=f"^query: must be float16.*got {str(dtype)[6:]}"):
        torch.ops.dilated.round_query_sums(rows(1, 4, 24, 16), query)


@pytest.mark.skipif(_C.built_with_cuda(), reason="this build has CUDA kernels")
def test_a_build_without_cuda_says_so() -> None:
    def on_cuda(name: str, *arguments: object) -> None:
        key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)  # as a CUDA tensor would
        getattr(torch.ops.dilated, name).default.redispatch(key, *arguments)

    q, k, v = make_qkv(24, 4, 16, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"attention: .*no CUDA kernels.*nvcc"):
        on_cuda("attention", q, k, v, [8], [1])
    with pytest.raises(NotImplementedError, match=r"gather: .*no CUDA kernels"):
        on_cuda("gather", q, 8, 2)


@pytest.mark.skipif(_C.built_with_cuda(), reason="this build has CUDA kernels")
def test_all_operators_have_something_to_say_to_cuda_tensors() -> None:
    schemas = torch._C._jit_get_all_schemas()
    names = {schema.name for schema in schemas if schema.name.startswith("dilated::")}
    assert len(names) >= 13
    composed = {"dilated::segment_attention", "dilated::make_query_sums"}  # of others
    for name in names - composed:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name


def test_vouch_refuses_words_that_it_cannot_read() -> None:
    words = plan_tensor(Spec(60, [8, 32], [1, 3]), "cpu")
    freed = words.clone()
    freed.untyped_storage().resize_(0)
    strided = torch.stack([words, words], 1)[:, 0]
    cases = {
        "pattern: must have memory": (words.clone(), freed),
        "copy: must have memory": (freed, words),
        "copy: must be contiguous with at least": (words[:4], words[:4]),
        "copy: must be contiguous": (strided, words),
        "copy: must be an int32 tensor of pattern's shape": (words[:-4], words),
    }
    for message, (copy, pattern) in cases.items():
        with pytest.raises(ValueError, match=message):
            torch.ops.dilated.vouch(copy, pattern)
