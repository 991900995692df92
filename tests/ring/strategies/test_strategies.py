"""Every strategy over processes equals the operator on the whole sequence, with all gradients."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dilated_attention_pytorch.pattern import PatternSpec, make_branches
from dilated_attention_pytorch.ring import Traffic
from dilated_attention_pytorch.ring.plans.layout import shards, stretches_per_rank
from dilated_attention_pytorch.ring.plans.plan import make_plan
from tests.ring.geometry import random_shards
from tests.ring.processes import Processes, group_of
from tests.ring.sharded import Case, compare, count_traffic, run_ring

STRATEGIES = ("ring", "gather", "all_to_all", "auto")
TABLE = ((0, -1, 0, 0), (1, 0, -1, -1), (-1, 2, 0, -1))


def check(workers: Processes, case: Case, strategies: tuple[str, ...] = STRATEGIES) -> None:
    if case.layout == "zigzag":
        strategies = tuple(name for name in strategies if name != "all_to_all")
    for rank, found in enumerate(workers.run(case.size, compare, case, strategies)):
        for strategy, errors in zip(strategies, found, strict=True):
            for name, error in errors.items():
                assert error < 1e-12, f"rank {rank}, {strategy}, {name}: {error:.1e}"


NAMED = {
    "aligned": Case((32, 32), (16, 32, 64), (1, 2, 4)),
    "aligned, four ranks": Case((16,) * 4, (16, 32, 64), (1, 2, 4)),
    "three ranks": Case((20, 20, 20), (10, 30, 60), (1, 2, 3)),
    "one rank": Case((40,), (8, 40), (1, 2)),
    "inside shards": Case((32, 32), (8, 16), (1, 2)),
    "unaligned": Case((23, 23), (7, 19, 40), (1, 3, 5)),
    "unequal shards": Case((5, 40, 11), (9, 30, 100), (1, 2, 4)),
    "empty shards": Case((0, 30, 0, 17), (9, 25, 47), (1, 2, 3)),
    "all rows on one rank": Case((0, 0, 33), (11, 33), (1, 2)),
    "nothing at all": Case((0, 0), (8,), (1,)),
    "one row a rank": Case((1, 1, 1, 1), (2, 4), (1, 2)),
    "long segments": Case((13, 29, 21), (10**9, 16), (3, 1)),
    "rates beyond segments": Case((20, 25), (4, 40), (8, 16)),
    "grouped heads": Case((24, 24), (16, 48), (1, 3), heads=8, kv_heads=2),
    "one KV head": Case((17, 20, 9), (12, 46), (2, 4), heads=6, kv_heads=1),
    "fewer KV heads than ranks": Case((16,) * 4, (64, 8), (4, 1), heads=4, kv_heads=2),
    "blocked offsets": Case(
        (20, 28), (12, 48), (2, 4), options={"head_offsets": ((0, 0, 1, 1), (0, 1, 2, 3))}
    ),
    "table with absent heads": Case(
        (20, 28), (12, 48, 30), (2, 2, 3), options={"head_offsets": TABLE}
    ),
    "a branch without heads": Case(
        (20, 28), (12, 48), (2, 3), options={"head_offsets": ((-1,) * 4, (1, 0, 2, -1))}
    ),
    "rows that no branch covers": Case(
        (20, 28), (12, 48), (3, 4), options={"head_offsets": ((2,) * 4, (3,) * 4)}
    ),
    "scale": Case((20, 20), (12, 40), (1, 2), options={"scale": 0.7}),
    "lattices that cross": Case((25, 25), (50, 50, 40), (2, 3, 4)),
    "odd head_dim": Case((15, 18), (12, 33), (1, 2), head_dim=5),
}


ZIGZAG = {
    "aligned": Case((8,) * 8, (16, 32, 64), (1, 2, 4)),
    "three ranks": Case((10,) * 6, (10, 30, 60), (1, 2, 3)),
    "one rank": Case((20, 20), (8, 40), (1, 2)),
    "inside stretches": Case((16,) * 4, (8, 16), (1, 2)),
    "unequal stretches": Case((5, 0, 21, 11, 3, 9, 14, 2), (9, 30, 100), (1, 2, 4)),
    "a rank without rows": Case((0, 12, 20, 0), (9, 47), (1, 2)),
    "neighbours on one rank": Case((6, 9, 13, 8), (7, 19, 36), (1, 3, 5)),
    "grouped heads": Case((12,) * 4, (16, 48), (1, 3), heads=8, kv_heads=2),
    "lattices that cross": Case((13, 12, 11, 14), (50, 50, 40), (2, 3, 4)),
    "dropout": Case((7,) * 6, (14, 42), (1, 2), options={"dropout_p": 0.4, "dropout_seed": 7}),
}


# Of batches: sequences that cross ranks, end at one, lie within one, are empty; rows of none.
SEQUENCES = {
    "crossing": Case((20, 28), (9, 30, 60), (1, 2, 4)),
    "unequal, with an empty shard": Case((5, 0, 31, 12), (9, 30, 60), (1, 2, 3)),
    "four ranks": Case((12,) * 4, (16, 48), (1, 3), heads=8, kv_heads=2),
    "dropout": Case((20, 28), (14, 42), (1, 2), options={"dropout_p": 0.4, "dropout_seed": 7}),
    "zeros": Case((20, 28), (9, 30, 60), (1, 2, 4), options={"padding": "zeros"}),
    "zigzag": Case((7, 5, 12, 3, 9, 12), (9, 30, 60), (1, 2, 4), layout="zigzag"),
}
PLACES = {
    "packed": ((0, 17), (17, 25), (42, 6)),
    "one that ends early": ((0, 31),),
    "gaps": ((3, 7), (12, 0), (13, 30)),
    "short ones": tuple((i, 3) for i in range(0, 48, 4)),
    "none": (),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", SEQUENCES)
def test_batches_equal_the_whole(
    workers: Processes, name: str, places: str, is_causal: bool
) -> None:
    case = SEQUENCES[name]
    options = {**case.options, "is_causal": is_causal, "sequences": PLACES[places]}
    check(workers, replace(case, batch=1, options=options), ("ring", "gather", "auto"))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ZIGZAG)
def test_zigzag_equals_the_whole(workers: Processes, name: str, is_causal: bool) -> None:
    case = ZIGZAG[name]
    options = {**case.options, "is_causal": is_causal}
    check(workers, replace(case, options=options, layout="zigzag"))


@pytest.mark.parametrize("seed", range(24))
def test_random_zigzags_equal_the_whole(workers: Processes, seed: int) -> None:
    check(workers, random_case(random.Random(seed), "zigzag"))


@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_equals_the_whole(workers: Processes, name: str, is_causal: bool, padding: str) -> None:
    case = NAMED[name]
    check(
        workers,
        Case(
            **{
                **vars(case),
                "options": {**case.options, "is_causal": is_causal, "padding": padding},
            }
        ),
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_calls_equal_the_whole(workers: Processes, seed: int) -> None:
    check(workers, random_case(random.Random(seed), "contiguous"))


def random_case(generator: random.Random, layout: str) -> Case:
    size = generator.choice([2, 3, 4])
    seq_len = generator.randint(1, 70)
    branches = generator.randint(1, 4)
    rates = tuple(generator.choice([1, 2, 3, 4, 8]) for _ in range(branches))
    kv_heads = generator.choice([1, 2, 3])
    heads = kv_heads * generator.choice([1, 2])
    options: dict[str, object] = {
        "is_causal": generator.random() < 0.5,
        "padding": generator.choice(["masked", "zeros"]),
    }
    if generator.random() < 0.5:
        options["head_offsets"] = tuple(
            tuple(generator.randint(-1, rate - 1) for _ in range(heads)) for rate in rates
        )
    lengths = tuple(generator.randint(1, seq_len + 5) for _ in range(branches))
    stretches = random_shards(generator, seq_len, size * stretches_per_rank(layout))
    return Case(stretches, lengths, rates, heads, kv_heads, options=options, layout=layout)


@pytest.mark.parametrize("strategy", ["ring", "gather"])
def test_dropout_drops_the_same_pairs_as_one_process(workers: Processes, strategy: str) -> None:
    options = {"dropout_p": 0.4, "dropout_seed": 7, "is_causal": True}
    check(workers, Case((20, 25, 11), (14, 60), (1, 2), options=options), (strategy, "auto"))


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once_whatever_the_number_of_ranks(
    workers: Processes, dtype: torch.dtype, strategy: str
) -> None:
    """Each result is as far from the whole as rounding puts it: half an ulp on each side."""
    eps = torch.finfo(dtype).eps
    # all_to_all rounds a branch's result once more, when it returns
    ulps = 8 if dtype == torch.float32 else 2 if strategy == "all_to_all" else 1
    for size in (2, 4):
        case = Case((64 // size,) * size, (16, 32, 64), (1, 2, 4), dtype=dtype)
        for errors in workers.run(size, compare, case, (strategy,)):
            for name, error in errors[0].items():
                assert error <= (1e-6 if name == "lse" else ulps * eps), (name, error / eps)


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
def test_repeats_bit_by_bit(workers: Processes, strategy: str) -> None:
    case = Case((20, 25, 11), (14, 60, 30), (1, 2, 3), dtype=torch.float32)
    assert all(workers.run(3, repeats, case, strategy, 3))


def repeats(size: int, case: Case, strategy: str, times: int) -> bool:
    group = group_of(size)
    first, *others = (
        run_ring(case, strategy, group.rank(), group.group_name) for _ in range(times)
    )
    return all(
        torch.equal(ours, theirs)
        for other in others
        for ours, theirs in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("strategy", ["ring", "gather"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_bytes_have_the_closed_form(
    workers: Processes, size: int, rate: int, strategy: str
) -> None:
    """F = (m - 1) / r in units of L, a rank's keys and values; backward F + 2 F, in float32."""
    n, heads, head_dim = 32, 4, 8
    unit = 2 * n * heads * head_dim * 2
    members = size
    while members >= 2:
        case = Case(
            (n,) * size, (members * n,), (rate,), batch=1, head_dim=head_dim, dtype=torch.bfloat16
        )
        for forward, backward in workers.run(size, count_traffic, case, strategy):
            expected = (members - 1) * unit / rate
            assert forward.bytes_sent == forward.bytes_received == expected
            assert backward.bytes_sent == backward.bytes_received == 3 * expected
            rounds = members - 1 if strategy == "ring" else 1
            assert forward.exchanges == rounds and backward.exchanges == 2 * rounds
            assert forward.messages_sent == members - 1
        members //= 2


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_bytes_of_all_to_all_have_the_closed_form(workers: Processes, size: int, rate: int) -> None:
    """A = 2 (m - 1) / (m r) and the lse; backward 5 (m - 1) / (m r) and two numbers a row."""
    n, heads, head_dim = 32, 4, 8
    unit = 2 * n * heads * head_dim * 2
    members = size
    while members >= 2:
        case = Case(
            (n,) * size, (members * n,), (rate,), batch=1, head_dim=head_dim, dtype=torch.bfloat16
        )
        for forward, backward in workers.run(size, count_traffic, case, "all_to_all"):
            share = (members - 1) / (members * rate)
            number = 4 * n * heads * share
            assert forward.bytes_sent == forward.bytes_received == 2 * share * unit + number
            assert backward.bytes_sent == backward.bytes_received == 5 * share * unit + 2 * number
        members //= 2


def test_bytes_equal_the_plan_for_any_shards(workers: Processes) -> None:
    for seed in range(8):
        generator = random.Random(seed)
        shards = random_shards(generator, 60, 3)
        lengths, rates = (generator.randint(2, 70), 23, 60), (1, 3, 2)
        case = Case(shards, lengths, rates, batch=2, head_dim=8, dtype=torch.float32)
        spec = PatternSpec(60, make_branches(lengths, rates), "interleaved", 4, 4)
        found = workers.run(3, count_traffic, case, "ring")
        for rank, (forward, backward) in enumerate(found):
            plan = make_plan(spec, shards, rank, "ring")
            row = 2 * 2 * 8 * 4  # keys and values, batch, head_dim, bytes
            assert forward.bytes_sent == plan.rows_sent * row
            assert forward.bytes_received == plan.rows_received * row
            both = (plan.rows_sent + plan.rows_received) * row
            assert backward.bytes_sent == backward.bytes_received == both


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all", "auto"])
def test_nothing_travels_inside_shards(workers: Processes, strategy: str) -> None:
    case = Case((32, 32), (8, 16, 32), (1, 2, 4))
    for forward, backward in workers.run(2, count_traffic, case, strategy):
        assert forward == backward == Traffic()


def strided(size: int, strategy: str) -> None:
    """Views of other storage, an expanded gradient, and inference mode."""
    group = group_of(size)
    case = Case((20, 25, 11), (14, 60, 30), (1, 2, 3), dtype=torch.float32)
    begin, end = shards(case.shard_lengths)[group.rank()]
    plain = [x[:, begin:end].contiguous() for x in case.tensors()]
    layouts = (
        lambda x: x,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
        lambda x: torch.cat([x, x + 1], dim=2)[:, :, : x.size(2)],
    )

    def attend(*inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.dilated.ring_attention(
            *inputs,
            case.segment_lengths,
            case.dilation_rates,
            group.group_name,
            shard_lengths=list(case.shard_lengths),
            strategy=strategy,
        )[0]
        return out

    results = []
    for layout in layouts:
        inputs = [layout(x).detach().requires_grad_() for x in plain]
        out = attend(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.sum(), inputs)])
        with torch.inference_mode():
            assert torch.equal(attend(*inputs), out)
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ring", "gather", "all_to_all"])
def test_any_layout_and_inference_mode(workers: Processes, strategy: str) -> None:
    workers.run(3, strided, strategy)
