"""The table of workloads, and the arithmetic of what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.workloads import (
    WORKLOADS,
    distinct_flops,
    floors,
    moved_bytes,
    nominal_flops,
    pairs,
    select,
)

ANCHORS = ["longnet-128k", "llm-128k", "longnet-32k", "gigapath-10k", "gigapath-65k"]
SEED = ["seed-1024", "seed-4096", "seed-16384"]


def test_select_takes_names_and_groups_in_the_order_of_the_table() -> None:
    assert [w.name for w in select(["anchors", "seed"])] == ANCHORS + SEED
    assert [w.name for w in select(["seed-4096", "longnet-32k"])] == ["longnet-32k", "seed-4096"]
    assert [w.seq_len // 1024 for w in select(["scale-N"])] == [8, 16, 32, 64, 128, 256, 512, 1024]


@pytest.mark.parametrize("causal", [False, True])
def test_nominal_flops_on_longnet_by_hand(causal: bool) -> None:
    # Each branch has N / r queries of w / r keys: per position 2048 / 1, 4096 / 4, 8192 / 16, ...
    keys = 2048 + 1024 + 512 + 256 + 128
    forward = 4 * 64 * 12 * 131072 * keys * (0.5 if causal else 1)
    workload = WORKLOADS["longnet-128k"]
    assert nominal_flops(workload, causal, "fwd") == forward
    assert nominal_flops(workload, causal, "bwd") == 2.5 * forward
    assert nominal_flops(workload, causal, "fwd+bwd") == 3.5 * forward


def test_nominal_flops_clips_segments_and_counts_the_batch() -> None:
    gigapath = WORKLOADS["gigapath-10k"]
    lengths = (1024, 5792, 10001, 10001, 10001)
    total = sum(
        4 * 48 * 16 * (10001 / r) * (w / r) for w, r in zip(lengths, (1, 2, 4, 8, 16), strict=True)
    )
    assert nominal_flops(gigapath, False, "fwd") == pytest.approx(total, rel=1e-12)
    seed = 4 * 64 * 8 * 4 * 1024 * (512 + 1024 / 4)
    assert nominal_flops(WORKLOADS["seed-1024"], False, "fwd") == seed


def test_planner_counts_the_same_nominal_pairs_where_everything_divides() -> None:
    workload = WORKLOADS["seed-4096"]
    nominal = nominal_flops(workload, False, "fwd")
    assert 4 * 64 * 2 * pairs(workload, False)["nominal"] == nominal
    # Of 512 + 256 keys of a covered query, 256 / 2 are shared: half of the queries are covered.
    distinct = 4096 * 8 * (512 + (256 - 128))
    assert pairs(workload, False)["distinct"] <= pairs(workload, False)["nominal"]
    assert pairs(workload, False)["distinct"] == distinct
    assert distinct_flops(workload, False, "fwd") == 4 * 64 * 2 * distinct


def test_bytes_are_each_input_once_and_each_output_once() -> None:
    workload = WORKLOADS["llm-128k-gqa"]
    tokens = 131072
    query, key, lse = tokens * 32 * 128 * 2, tokens * 8 * 128 * 2, tokens * 32 * 4
    forward = 2 * query + 2 * key + lse
    backward = 4 * query + 4 * key + lse
    assert moved_bytes(workload, "fwd") == forward
    assert moved_bytes(workload, "bwd") == backward
    assert moved_bytes(workload, "fwd+bwd") == forward + backward


def test_floor_is_operations_and_bytes_over_the_ceilings() -> None:
    workload = WORKLOADS["seed-1024"]
    ceilings = {"matmul_tflops": 100.0, "copy_gbps": 1000.0}
    arithmetic_ms, bytes_ms = floors(workload, False, "fwd", ceilings)
    flops, moved = distinct_flops(workload, False, "fwd"), moved_bytes(workload, "fwd")
    assert arithmetic_ms == pytest.approx(flops / 100e12 * 1e3, rel=1e-12)
    assert bytes_ms == pytest.approx(moved / 1e12 * 1e3, rel=1e-12)


def test_a_batch_costs_what_its_sequences_do() -> None:
    batch = WORKLOADS["cpu-packed"]
    assert batch.stretches[0] == (0, batch.lengths[0])
    assert batch.stretches[-1][1] == batch.seq_len == sum(batch.lengths)
    for causal in (False, True):
        alone = [replace(batch, seq_len=n, lengths=()) for n in batch.lengths]
        for count in ("nominal", "distinct"):
            assert pairs(batch, causal)[count] == sum(pairs(one, causal)[count] for one in alone)
        total = sum(nominal_flops(one, causal, "fwd") for one in alone)
        assert nominal_flops(batch, causal, "fwd") == pytest.approx(total)
    assert abs(WORKLOADS["slides-200k"].seq_len - 200_000) < 5_000


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_names_match_and_every_workload_can_be_planned(name: str) -> None:
    workload = WORKLOADS[name]
    assert workload.name == name
    assert workload.heads % workload.key_heads == 0
    if workload.seq_len <= 16411:
        counts = pairs(workload, workload.causal[-1])
        assert 0 < counts["distinct"] <= counts["nominal"]
        assert counts["distinct"] <= counts["computed"]
