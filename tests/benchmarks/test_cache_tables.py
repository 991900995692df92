"""The tables of the caches say what the data say, whichever way they fall."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.cache_tables import CACHES_SECTIONS, compare
from benchmarks.caches import PARTS
from benchmarks.workloads import CACHE_WORKLOADS as NAMES


def row(workload: str, cache: str, factor: float, rounds: int = 20) -> dict[str, Any]:
    rng = random.Random(f"{workload} {cache}")
    samples = {str(i): 4.0 * factor * (1 + 0.002 * rng.random()) for i in range(rounds)}
    low, middle, high = (sorted(samples.values())[place] for place in (0, rounds // 2, -1))
    parts = {f"{part}_ms": 0.01 for part in PARTS} | {"management_ms": 0.02, "kernel_ms": 3.9}
    counts = {"hits": 9, "misses": 3, "hot_hits": 7, "prefetches": 5}
    return {
        **{"workload": workload, "cache": cache, "ms": middle, "ms_p10": low, "ms_p90": high},
        **{**parts, "gpu_mib": 1.5, "host_mib": 2.5, "hit_rate": 0.75, "samples_ms": samples},
        "statistics": {**counts, "prefetch_hits": 4, "wasted_prefetches": 1},
    }


def document(**v3: float) -> dict[str, Any]:
    """V3 takes as many times V2's time as is given for a workload, dashes being underscores."""
    factors = {name: v3.get(name.replace("-", "_"), 1.0) for name in NAMES}
    rows = [
        row(name, cache, factor)
        for name in NAMES
        for cache, factor in (("none", 1.5), ("v2", 1.0), ("v3", factors[name]))
    ]
    times = {
        f"{key}_ms": [ms + 0.001 * i for i in range(20)] for key, ms in (("off", 2), ("on", 1))
    }
    return {
        **{"commit": "c0ffee", "device": "NVIDIA X", "driver": "1.2", "file": "caches-x.json"},
        **{"date": "2026-01-02T03:04:05", "protocol": {"rounds": 20, "slides": 1000}},
        "versions": {"torch": "2.11.0", "python": "3.12.0"},
        "rows": rows,
        "hits": [{"cache": "v2", "us": 2.0}, {"cache": "v3", "us": 6.0}],
        "options": [{"option": "pinning", "where": "somewhere", **times}],
        "skipped": [],
    }


def section(name: str, found: dict[str, Any]) -> str:
    return CACHES_SECTIONS[f"caches-{name}"](found)


def test_says_what_differs_and_what_does_not() -> None:
    found = section("times", document(seed_1024=1.2, seed_4096=1.006, slides=0.8))
    lines = {line.split(" |")[0]: line for line in found.splitlines()}
    assert "| V3 is 20.0 % slower |" in lines["| seed-1024"]
    assert "| V3 is 20.0 % faster |" in lines["| slides"]
    for name in ("seed-4096", "seed-16384"):
        assert "| no difference that matters |" in lines[f"| {name}"]


def test_a_small_sure_difference_and_a_large_unsure_one_are_none() -> None:
    sure = compare([1.0] * 30, [1.005] * 30)
    assert sure.p < 0.01 and not sure.matters
    rng = random.Random(0)
    noise = compare([rng.uniform(1, 3) for _ in range(30)], [rng.uniform(1, 3) for _ in range(30)])
    assert not noise.matters and noise.verdict("V3") == "no difference that matters"
    assert not compare([1.0, 1.0], [2.0, 2.0]).matters  # two pairs prove nothing
    slower = compare([1.0] * 30, [1.25] * 30)
    assert slower.verdict("V3") == "V3 is 25.0 % slower"
    assert slower.low == slower.ratio == slower.high == 1.25


def test_aims_are_held_against_the_numbers() -> None:
    found = document()
    said = section("hits", found)
    assert "V2: a hit costs 2.00 us" in said and "within the aim of 3 us" in said
    assert "V3: a hot hit costs 6.00 us" in said and "beyond the aim of 5 us" in said
    assert "0.769% of the kernels' time; within the aim of 1%" in said
    for each in found["rows"]:
        each["management_ms"] = 0.2
    assert "5.385% of the kernels' time; beyond the aim of 1%" in section("hits", found)


def test_an_option_gains_where_it_takes_less_time() -> None:
    found = document()
    assert "| yes | not offered |" in section("options", found)
    option = found["options"][0]
    option["on_ms"], option["off_ms"] = option["off_ms"], option["on_ms"]
    option["option"] = "batched transfer"
    assert "| no | on (`batch_transfers=True`) |" in section("options", found)


def test_what_was_told_ahead_has_a_column_where_it_was_measured() -> None:
    found = document()
    assert "V2, announced" not in section("times", found)
    found["rows"].append(row("slides", "v2-announced", 0.9))
    assert "| V2, ms | V2, announced, ms | V3, ms |" in section("times", found)


def test_incomplete_runs_are_reported_as_they_are() -> None:
    found = document()
    found["rows"] = [each for each in found["rows"] if each["workload"] == "seed-1024"]
    found["skipped"] = [{"workload": "slides", "reason": "no time"}]
    assert "Not measured: workload slides, reason no time." in section("run", found)
    assert "`slides` was not measured." in section("parts", found)
    assert "caches-x.json](../benchmarks/results/caches-x.json)" in section("run", found)


def test_the_kernels_time_is_a_workloads_least() -> None:
    found = document()
    found["rows"][1]["kernel_ms"] = 9.9  # V2's first: the host was slow
    lines = [line for line in section("parts", found).splitlines() if "| seed-1024 |" in line]
    assert len(lines) == 3 and all("| 3.9 |" in line for line in lines)
