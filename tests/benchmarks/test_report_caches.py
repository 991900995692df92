"""The report says what the data say, whichever way they fall."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cache_tables, report_caches
from benchmarks.significance import compare

NAMES = ["seed-1024", "seed-4096", "seed-16384", "longnet-128k", "slides"]


def row(workload: str, cache: str, factor: float, rounds: int = 20) -> dict[str, Any]:
    rng = random.Random(f"{workload} {cache}")
    samples = [4.0 * factor * (1 + 0.002 * rng.random()) for _ in range(rounds)]
    values = sorted(samples)
    counts = {"hits": 9, "misses": 3, "hot_hits": 7, "prefetches": 5}
    return {
        "workload": workload,
        "cache": cache,
        "ms": values[rounds // 2],
        "ms_p10": values[0],
        "ms_p90": values[-1],
        "planning_ms": 0.0 if cache != "none" else 0.5,
        "transfer_ms": 0.01,
        "waiting_ms": 0.0,
        "management_ms": 0.02,
        "kernel_ms": 3.9,
        "gpu_mib": 1.5,
        "host_mib": 2.5,
        "hit_rate": 0.75,
        "samples_ms": {str(index): value for index, value in enumerate(samples)},
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
    option = {
        "option": "pinning",
        "where": "somewhere",
        "setting": {"pin_after": 1000},
        "absence": {"pin_after": None},
        "off_ms": [2.0 + 0.001 * i for i in range(20)],
        "on_ms": [1.0 + 0.001 * i for i in range(20)],
    }
    return {
        "commit": "c0ffee",
        "device": "NVIDIA X",
        "device_type": "cuda",
        "driver": "1.2",
        "versions": {"torch": "2.11.0", "python": "3.12.0"},
        "date": "2026-01-02T03:04:05+00:00",
        "protocol": {"rounds": 20, "slides": 1000},
        "rows": rows,
        "hits": [
            {"cache": "v2", "us": 2.0, "hot": True},
            {"cache": "v3", "us": 6.0, "hot": True},
        ],
        "options": [option],
        "skipped": [],
    }


def test_says_that_v3_is_slower_where_it_is() -> None:
    found = cache_tables.summary(document(seed_1024=1.2, slides=1.1))
    assert "V3 is slower than V2 on `seed-1024` and `slides`." in found
    assert "these data support deprecating V3: it costs time" in found
    assert "`seed-4096`, `seed-16384` and `longnet-128k` they do not differ" in found


def test_says_that_v3_is_faster_where_it_is() -> None:
    found = cache_tables.summary(document(seed_1024=1.2, slides=0.8))
    assert "V3 is slower than V2 on `seed-1024`." in found
    assert "V3 is faster than V2 on `slides`." in found
    assert "do not support deprecating V3 for what `slides` stands for" in found


def test_says_so_where_nothing_differs_by_what_matters() -> None:
    found = cache_tables.summary(document(seed_1024=1.006))
    assert "slower" not in found and "faster" not in found
    assert "support deprecating V3 for its complexity" in found


def test_a_small_sure_difference_and_a_large_unsure_one_are_none() -> None:
    sure = compare([1.0] * 30, [1.005] * 30)
    assert sure.is_significant and cache_tables.verdict(sure, "V3") == "no difference that matters"
    rng = random.Random(0)
    noise = compare([rng.uniform(1, 3) for _ in range(30)], [rng.uniform(1, 3) for _ in range(30)])
    assert not noise.is_significant
    few = compare([1.0, 1.0], [2.0, 2.0])
    assert not few.is_significant  # two pairs prove nothing
    slower = compare([1.0] * 30, [1.25] * 30)
    assert cache_tables.verdict(slower, "V3") == "V3 is 25.0 % slower"
    assert slower.low == slower.ratio == slower.high == 1.25


def test_pairs_are_needed() -> None:
    for base, other in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="pairs are needed"):
            compare(base, other)


def test_only_rounds_of_both_are_compared() -> None:
    v2, v3 = row("slides", "v2", 1.0), row("slides", "v3", 1.0)
    v3["samples_ms"] = {"3": 8.0, "99": 1.0}
    result = cache_tables.compare_rows(v2, v3)
    assert result is not None and result.pairs == 1 and result.ratio == pytest.approx(2, rel=0.01)
    v3["samples_ms"] = {"99": 1.0}
    assert cache_tables.compare_rows(v2, v3) is None


def test_aims_are_held_against_the_numbers() -> None:
    found = document()
    said = cache_tables.overheads(found)
    assert "V2: a hit costs 2.00 us" in said and "within the aim of 3 us" in said
    assert "V3: a hot hit costs 6.00 us" in said and "beyond the aim of 5 us" in said
    assert "0.769% of the kernels' time; within the aim of 1%" in said
    for each in found["rows"]:
        each["management_ms"] = 0.2
    assert "5.385% of the kernels' time; beyond the aim of 1%" in cache_tables.overheads(found)


def test_a_default_against_the_data_is_marked() -> None:
    found = document()
    assert "| yes | not offered, against these data |" in cache_tables.options(found)
    option = found["options"][0]
    option["on_ms"], option["off_ms"] = option["off_ms"], option["on_ms"]
    assert "| no | not offered |" in cache_tables.options(found)


def write(root: Path, name: str, content: dict[str, Any]) -> None:
    folder = root / "benchmarks" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_report_is_written_from_the_newest_run_on_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    newer = {**document(slides=0.7), "date": "2026-02-01T00:00:00+00:00", "device": "NVIDIA Y"}
    write(tmp_path, "caches-x.json", document())
    write(tmp_path, "caches-y.json", newer)
    latest = {**document(), "date": "2026-03-01T00:00:00+00:00", "device_type": "cpu"}
    write(tmp_path, "caches-z.json", latest)
    assert report_caches.main(tmp_path, lambda line: None)
    folder = tmp_path / "docs" / "reports"
    report = (folder / "v2-v3.md").read_text()
    assert "NVIDIA Y" in report and "caches-y.json" in report and "$" not in report
    assert "V3 is faster than V2 on `slides`." in report
    assert "| seed-16384 | 361.6 | 218.5 | 0.60 |" in report
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"v2-v3.md", "v2-v3-ratio.svg", "v2-v3-split.svg"}
    report_caches.main(tmp_path, lambda line: None)
    assert first == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_on_a_cpu_makes_no_report(tmp_path: Path) -> None:
    write(tmp_path, "caches-z.json", {**document(), "device_type": "cpu"})
    said: list[str] = []
    assert not report_caches.main(tmp_path, said.append)
    assert "no run on a GPU" in said[0] and not (tmp_path / "docs").exists()


def test_incomplete_runs_are_reported_as_they_are() -> None:
    found = copy.deepcopy(document())
    found["rows"] = [each for each in found["rows"] if each["workload"] == "seed-1024"]
    found["skipped"] = [{"workload": "slides", "reason": "no time"}]
    text = report_caches.text(found, "caches-x.json")
    assert "Not measured: workload slides, reason no time." in text
    assert "| seed-4096 | 7.4 | 6.8 | 0.92 | - | - | - |" in text
    assert "`slides` was not measured." in text
