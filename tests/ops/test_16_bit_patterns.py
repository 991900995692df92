"""16-bit outputs and gradients over random patterns, layouts and head dimensions, against float64.

DILATED_FUZZ_CASES=5000 in the environment tries so many instead of 40.
"""

from __future__ import annotations

import os
import random
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import make_qkv
from tests.ops.calls import deterministic_mode, run_operator, run_reference
from tests.planning import Spec, plan_tensor
from tests.reference import dropout_keep, reference_attention

CASES = int(os.environ.get("DILATED_FUZZ_CASES", "40"))
RATES = [[1], [3], [1, 2], [2, 4], [1, 3, 5], [1, 2, 4, 6, 12], [1, 2, 4, 8, 16], [5, 7, 8, 9]]


def random_call(seed: int) -> tuple[dict[str, Any], list[int], list[int], dict[str, Any]]:
    """make_qkv's arguments, segment lengths, rates, and options of the operator."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2])
    shape = {
        "seq_len": rng.choice([64, 100, 257, 400, 700]),
        "heads": kv_heads * rng.choice([1, 3]),
        "head_dim": rng.choice([16, 40, 48, 64, 72, 96, 128, 160, 192, 256]),
        "kv_heads": kv_heads,
        "batch": rng.choice([1, 2]),
        "dtype": rng.choice([torch.float16, torch.bfloat16]),
        "seed": seed,
    }
    rates = rng.choice(RATES)
    lengths = sorted(rng.randint(rates[-1] + 1, shape["seq_len"] + 10) for _ in rates)
    table = [[rng.randrange(rate) for _ in range(shape["heads"])] for rate in rates]
    is_causal = rng.random() < 0.4
    options = {
        "head_offsets": torch.tensor(table),
        "is_causal": is_causal,
        "padding": "masked" if is_causal else rng.choice(["masked", "zeros"]),
        "dropout_p": rng.choice([0.0, 0.0, 0.3]),
    }
    return shape, lengths, rates, options


def cut_pattern(
    seed: int, tensors: tuple[Tensor, ...], lengths: list[int], rates: list[int], **options: Any
) -> Tensor | None:
    """The pattern in tiles of 64 or 16 rows, or None for what the operator chooses."""
    row_tile = (64, 16, None)[seed % 3]
    if row_tile is None:
        return None
    query, key, _ = tensors
    spec = Spec(
        query.shape[1],
        lengths,
        rates,
        query.shape[2],
        key.shape[2],
        options["head_offsets"].tolist(),
        options["is_causal"],
        options["padding"] == "zeros",
        row_tile=row_tile,
    )
    return plan_tensor(spec, query.device.type)


def random_layout(tensors: tuple[Tensor, ...], rng: random.Random) -> tuple[Tensor, ...]:
    """The same numbers, elsewhere in memory."""
    kind = rng.choice(["as they are", "heads first", "in one", "odd"])
    if kind == "heads first":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    if kind == "in one":  # projection
        sizes = [x.shape[2] for x in tensors]
        return torch.cat(tensors, dim=2).split(sizes, dim=2)
    if kind == "odd":  # rows that copies of 16 bytes can't take
        return tuple(
            torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1:-2] for x in tensors
        )
    return tensors


def attend_by_blocks(
    tensors: tuple[Tensor, ...],
    lengths: list[int],
    rates: list[int],
    *,
    rng: random.Random,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The operator over pieces of the keys, in any order, some empty."""
    q, k, v = tensors
    seq_len = q.shape[1]
    cuts = [0, *sorted(rng.randrange(seq_len + 1) for _ in range(rng.randint(1, 3))), seq_len]
    pieces = list(zip(cuts, cuts[1:], strict=False))
    rng.shuffle(pieces)
    out = lse = None
    for i, (begin, end) in enumerate(pieces):
        keys, values = k[:, begin:end], v[:, begin:end]
        partial = i + 1 < len(pieces)
        out, lse = torch.ops.dilated.attention_block(
            q, keys, values, seq_len, 0, begin, lengths, rates,
            out=out, lse=lse, partial=partial, **options,
        )  # fmt: skip
    return out, lse


def run_both(
    tensors: tuple[Tensor, ...],
    lengths: list[int],
    rates: list[int],
    blocks: random.Random | None = None,
    pattern: Tensor | None = None,
    **options: Any,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The operator's out and lse, and the definition's, all in float64 on the CPU."""
    q, k, v = tensors
    exact = [x.detach().to("cpu", torch.float64) for x in tensors]
    given = dict(options)
    if options.get("dropout_p", 0.0) > 0:
        seed = torch.tensor(11)
        given["dropout_seed"] = seed.to(q.device)
        positions = (0, q.shape[1])
        options["keep"] = dropout_keep(
            11, options["dropout_p"], q.shape[0], q.shape[2], positions, positions
        )
    if blocks is None:
        ours = torch.ops.dilated.attention(q, k, v, lengths, rates, pattern=pattern, **given)
    else:
        ours = attend_by_blocks(tensors, lengths, rates, rng=blocks, **given)
    theirs = reference_attention(*exact, lengths, rates, **options)
    return tuple(x.to("cpu", torch.float64) for x in ours), theirs  # type: ignore[return-value]


def check(
    tensors: tuple[Tensor, ...], lengths: list[int], rates: list[int], **options: Any
) -> None:
    """blocks: whoever cuts the keys into them."""
    (out, lse), (expected, expected_lse) = run_both(tensors, lengths, rates, **options)
    finite = torch.isfinite(expected_lse)
    assert torch.equal(lse[~finite], expected_lse[~finite])
    assert (lse - expected_lse)[finite].abs().max() <= 1e-4
    # A weight and the output are each rounded by at most eps / 2 of their size.
    kept = 1 - options.get("dropout_p", 0.0)
    largest = tensors[2].detach().double().nan_to_num().abs().max().item() / kept
    assert (out - expected).abs().max() <= torch.finfo(tensors[0].dtype).eps * largest


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("seed", range(CASES))
def test_random_patterns(seed: int, in_blocks: bool, device: str) -> None:
    shape, lengths, rates, options = random_call(seed)
    rng = random.Random(-seed - 1)
    tensors = random_layout(make_qkv(**shape, device=device, poison=True), rng)
    blocks = rng if in_blocks else None
    pattern = None if in_blocks else cut_pattern(seed, tensors, lengths, rates, **options)
    check(tensors, lengths, rates, blocks=blocks, pattern=pattern, **options)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_gradients(seed: int, device: str) -> None:
    shape, lengths, rates, options = random_call(seed)
    tensors = make_qkv(**shape, device=device, poison=True)
    if options["dropout_p"] > 0:
        options["dropout_seed"] = torch.tensor(seed, device=device)
    pattern = cut_pattern(seed, tensors, lengths, rates, **options)
    actual = run_operator(tensors, lengths, rates, pattern=pattern, **options)
    expected = run_reference(tensors, lengths, rates, **options)
    for name in ("grad_query", "grad_key", "grad_value"):
        ours, theirs = getattr(actual, name).to("cpu", torch.float64), getattr(expected, name)
        assert (ours - theirs).norm() <= torch.finfo(tensors[0].dtype).eps * theirs.norm(), name


@pytest.mark.parametrize("head_dim", [24, 61, 64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_sequences_of_a_few_positions(
    seed: int, is_causal: bool, head_dim: int, device: str
) -> None:
    rng = random.Random(seed)
    dtype = rng.choice([torch.float16, torch.bfloat16])
    places = [0, *accumulate(rng.choice([1, 8, 9, 16, rng.randint(2, 60)]) for _ in range(20))]
    tensors = make_qkv(places[-1], 4, head_dim, kv_heads=2, dtype=dtype, device=device, seed=seed)
    branches = rng.choice([([64, 128], [1, 2]), ([16, 30], [2, 1]), ([64, 100, 200], [1, 3, 4])])
    sequences = [(first, end - first) for first, end in pairwise(places)]
    out, lse = torch.ops.dilated.attention(
        *tensors, *branches, is_causal=is_causal, sequences=torch.tensor(sequences)
    )
    exact = [x.to("cpu", torch.float64) for x in tensors]
    largest = exact[2].abs().max().item()
    for first, length in sequences:
        here = slice(first, first + length)
        alone = [x[:, here] for x in exact]
        expected, expected_lse = reference_attention(*alone, *branches, is_causal=is_causal)
        assert (out[:, here].cpu() - expected).abs().max() <= torch.finfo(dtype).eps * largest
        torch.testing.assert_close(lse[..., here].cpu().double(), expected_lse, rtol=0, atol=1e-4)


@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_keys_that_no_query_sees_may_hold_anything(head_dim: int, device: str) -> None:
    q, k, v = make_qkv(500, 2, head_dim, dtype=torch.bfloat16, device=device)
    on_the_lattice = torch.arange(500, device=device) % 100 % 3 == 1
    table = torch.ones(1, 2, dtype=torch.int64)
    options: dict[str, Any] = {"head_offsets": table}
    before = torch.ops.dilated.attention(q, k, v, [100], [3], **options)
    for spoiled in (k, v):
        spoiled[:, ~on_the_lattice] = torch.nan
    after = torch.ops.dilated.attention(q, k, v, [100], [3], **options)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["heads", "batch", "transposed"])
def test_keys_in_other_layouts(layout: str, device: str) -> None:
    q, k, v = make_qkv(300, 4, 64, batch=2, dtype=torch.bfloat16, device=device)
    if layout == "heads":
        k, v = (x[:, :, :1].expand(-1, -1, 4, -1) for x in (k, v))
    elif layout == "batch":
        k, v = (x[:1].expand(2, -1, -1, -1) for x in (k, v))
    else:
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    check((q, k, v), [100, 300], [1, 4])


@pytest.mark.parametrize("head_dim", [48, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_long_outputs_repeat_to_the_bit(head_dim: int, is_causal: bool, device: str) -> None:
    """With more tiles than a GPU runs at once, while its caches are cold and warm."""
    seq_len = 9001 if device == "cuda" else 901
    tensors = make_qkv(seq_len, 6, head_dim, dtype=torch.bfloat16, device=device)
    lengths, rates = [seq_len // 20, seq_len // 3, seq_len], [1, 2, 8]
    with deterministic_mode():
        first, *others = (
            torch.ops.dilated.attention(*tensors, lengths, rates, is_causal=is_causal)
            for _ in range(20)
        )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
