"""`bench caches` from its command line, on workloads that take milliseconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench, caches
from benchmarks.workloads import CACHE_WORKLOADS as NAMES
from benchmarks.workloads import WORKLOADS, CacheWorkload, cache_workloads, slide_lengths

ROW = (
    *("workload", "cache", "ms", "ms_p10", "ms_p90", "planning_ms", "transfer_ms", "kernel_ms"),
    *("management_ms", "waiting_ms", "gpu_mib", "host_mib", "hit_rate", "calls"),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    base = replace(WORKLOADS["seed-1024"], seq_len=64, heads=2, head_dim=8)

    def workloads(slides: int) -> list[CacheWorkload]:
        lengths = tuple(range(40, 40 + slides))
        fixed = [CacheWorkload(replace(base, name=name), (64,)) for name in NAMES[:-1]]
        return [*fixed, CacheWorkload(replace(base, name="slides", seq_len=100), lengths)]

    monkeypatch.setattr(caches, "cache_workloads", workloads)
    small = {"SLIDES": 60, "ROUNDS": 4, "ROUND_MS": 0.1, "LARGE": 200, "_HITS": 10}
    for name, value in small.items():
        monkeypatch.setattr(caches, name, value)


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    options = ["--device", "cpu", "--commit", "c0ffee", "--out", str(tmp_path)]
    bench.main(["caches", *options, *arguments])
    (path,) = tmp_path.iterdir()
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.usefixtures("tiny")
def test_writes_a_row_for_every_workload_and_cache(tmp_path: Path) -> None:
    document = run(tmp_path)
    rows = document["rows"]
    assert [(row["workload"], row["cache"]) for row in rows] == [
        (name, cache)
        for name in NAMES
        for cache in ("none", "v2", "v2-announced", "v3")
        if cache != "v2-announced" or name == "slides"
    ]
    for row in rows:
        assert set(ROW) <= row.keys()
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["kernel_ms"] > 0 and row["gpu_mib"] == 0
    found = {(row["workload"], row["cache"]): row for row in rows}
    assert found["seed-1024", "v2"]["hit_rate"] > 0.7
    assert found["seed-1024", "none"]["host_mib"] == 0
    # A new length in each of 60 steps of twelve calls: V2 misses it once, V3 has it ahead.
    assert found["slides", "v2"]["hit_rate"] == 11 / 12
    assert found["slides", "v2"]["statistics"]["misses"] == 60
    assert found["slides", "v3"]["hit_rate"] > 11 / 12
    assert found["slides", "v2-announced"]["hit_rate"] > 11 / 12
    assert [*found["slides", "v2"]["samples_ms"]] == ["0", "1", "2", "3"]
    assert [*found["slides", "none"]["samples_ms"]] == ["0"]
    assert found["slides", "none"]["planning_ms"] > 0 == found["slides", "none"]["management_ms"]
    assert found["seed-1024", "v2"]["management_ms"] > 0
    assert document["device_type"] == "cpu" and document["commit"] == "c0ffee"
    assert [hit["cache"] for hit in document["hits"]] == ["v2", "v3"]
    options = {option["option"]: option for option in document["options"]}
    assert [*options] == ["batched transfer", "asynchronous transfer"]
    assert all(len(o["on_ms"]) == len(o["off_ms"]) == 2 for o in options.values())


@pytest.mark.usefixtures("tiny")
def test_when_the_time_is_up_the_file_says_what_is_missing(tmp_path: Path) -> None:
    document = run(tmp_path, "--budget-seconds", "0", "--workloads", "seed-1024,slides")
    assert {row["workload"] for row in document["rows"]} == {"seed-1024", "slides"}
    assert [*document["rows"][1]["samples_ms"]] == ["0", "1"]
    assert {"workload": "slides", "reason": "2 of 4 rounds: no time"} in document["skipped"]
    assert {"option": "batched transfer", "reason": "no time"} in document["skipped"]


def test_lengths_of_slides_are_distinct_and_the_same_each_time() -> None:
    lengths = slide_lengths(1000)
    assert lengths == slide_lengths(1000) and len(set(lengths)) == 1000
    assert min(lengths) >= 500 and max(lengths) <= 70_000
    assert 4_000 < sorted(lengths)[500] < 9_000
    workloads = cache_workloads(1000)
    assert [workload.base.name for workload in workloads] == list(NAMES)
    assert workloads[-1].spec(1).seq_len == lengths[1]
    assert [workload.base.batch for workload in workloads[:3]] == [4, 2, 1]
