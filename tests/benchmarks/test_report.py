"""What the documents say about speed is what the committed results say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, tables
from benchmarks import results as files
from benchmarks.plots import draw_lengths, points
from benchmarks.readme_tables import cpu_section, readme_section
from benchmarks.results import RESULTS, ROOT
from benchmarks.workloads import WORKLOADS, floors

DOCUMENTS = (
    "README.md",
    "docs/performance.md",
    "docs/ring.md",
    "docs/decoding.md",
    "docs/caches.md",
)
CEILINGS = {"matmul_tflops": 500.0, "copy_gbps": 2000.0}
BOTH = {"pass": "fwd+bwd"}
Make = Callable[..., Callable[[str, str], str]]


def row(workload: str, impl: str, ms: float, **changes: Any) -> dict[str, Any]:
    what = {"workload": workload, "causal": False, "impl": impl, "pass": "fwd"}
    times = {"protocol": "sustained", "ms": ms, "ms_p10": ms * 0.9, "ms_p90": ms * 1.1}
    state = {"peak_mib": 456.0, "sm_mhz": 1500.0, "watts": 690.0, "launches": 10}
    return {**what, **times, "nominal_tflops": 123.0, **state, **changes}


def run(date: str, *rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    machine = {"device": "Test GPU", "device_type": "cuda", "driver": "1.2.3"}
    versions = {"torch": "2.11.0", "cudnn": "91900"}
    state = {"clocks": {"power_limit_watts": 700.0}, "ceilings": CEILINGS}
    what = {"commit": "0123456789abcdef", "versions": versions, "date": date}
    return {**what, **machine, **state, "rows": list(rows), "skipped": [], **changes}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the documents and no results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def section(path: Path, name: str) -> str:
    """What stands between the comments `name` and `/name`."""
    return path.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def save(tree: Path, *runs: dict[str, Any], name: str = "ops") -> Path:
    folder = tree / "benchmarks" / "results"
    for index, document in enumerate(runs):
        files.write(folder / f"{name}-{index}.json", document)
    return folder


@pytest.fixture
def make(tree: Path) -> Make:
    """The documents with some runs' results: file and section -> text."""

    def made(*runs: dict[str, Any], name: str = "ops") -> Callable[[str, str], str]:
        save(tree, *runs, name=name)
        report.main(tree, lambda text: None)
        return lambda file, part: section(tree / file, part)

    return made


def cells(text: str, begin: str) -> list[list[str]]:
    """Of the lines of a table that begin so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {begin}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_of_one_commit_are_one(tree: Path) -> None:
    first = [row("longnet-128k", "ours", 2.0), row("longnet-128k", "torchscale", 9.0)]
    second = [row("longnet-128k", "ours", 3.0), row("longnet-128k", "sdpa-views", 4.0)]
    other = run("2026-01-02T03", commit="f" * 16)
    folder = save(tree, run("2026-01-02T01", *first), run("2026-01-02T02", *second), other)
    joined, last = report.load(folder, "ops")
    found = [(each["impl"], each["ms"]) for each in joined["rows"]]
    assert found == [("ours", 2.0), ("torchscale", 9.0), ("sdpa-views", 4.0)]
    assert last["commit"] == "f" * 16


def test_the_run_with_most_rows_has_the_ceilings_and_the_last_word(make: Make, tree: Path) -> None:
    few = [row("longnet-128k", "ours", 3.5)]
    many = [row("longnet-128k", "ours", 2.125), row("llm-128k", "ours", 9.0)]
    other = {"matmul_tflops": 600.0, "copy_gbps": 2500.0}
    runs = run("2026-01-02T01", *few), run("2026-01-02T02", *many, ceilings=other)
    table = make(*runs, run("2026-01-02T03", *few))("docs/performance.md", "measurements")
    (joined,) = report.load(tree / "benchmarks" / "results", "ops")
    assert joined["ceilings"] == other and len(joined["rows"]) == 2
    assert "2.12" in table and "3.5" not in table


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_say_what_the_committed_results_say(name: str) -> None:
    for marker, body in report.sections(RESULTS)[name].items():
        said = body or report._NOTHING.format(up="" if name == "README.md" else "../")
        assert section(ROOT / name, marker) == said, "run python -m benchmarks.bench report"


def test_committed_results_are_of_known_workloads_and_as_they_are_written(tmp_path: Path) -> None:
    documents = report.load(RESULTS, "ops")
    assert all(document["commit"] != "unknown" for document in documents)
    assert {each["workload"] for d in documents for each in d["rows"]} <= WORKLOADS.keys()
    for path in RESULTS.glob("*.json"):
        files.write(tmp_path / path.name, json.loads(path.read_text()))
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


def test_without_results_the_documents_say_so(make: Make, tree: Path) -> None:
    make()
    for name in DOCUMENTS:
        assert "No measurement is committed" in (tree / name).read_text()


def test_table_holds_the_numbers_of_the_file(make: Make) -> None:
    rows = [
        row("longnet-128k", "ours", 2.6543),
        row("longnet-128k", "torchscale", 18.24, peak_mib=1773.0),
        row("longnet-128k", "library-bound-cudnn", 3.55),
        row("longnet-128k", "library-bound-fa4", 3.44),
        row("longnet-128k", "ours", 2.4, protocol="isolated"),
        row("longnet-128k", "flex", 30.0, **BOTH),
        row("longnet-128k", "ours", 9.0, **BOTH),
        row("seed-1024", "ours", 0.0305, **{"pass": "host", "launch_ms": 0.0042}),
    ]
    find = make(run("2026-01-01", *rows))
    said = find("docs/performance.md", "summary")
    assert cells(said, "longnet-128k")[0] == [
        *("longnet-128k", "fwd", "**2.65**", "123", "2.55, 96 %", "3.44", "-", "18.2"),
        "456 / 1773",
    ]
    (names,) = cells(said, "workload")
    assert "flex" in names
    assert not {"sdpa-views", "full attention"} & set(names), "columns without a figure are out"
    assert "takes 30 us of the host's time" in said and "takes 4 us" in said
    assert "Test GPU, driver 1.2.3; torch 2.11.0" in said and "0123456789ab" in said
    full = find("docs/performance.md", "measurements")
    assert full.count("| longnet-128k |") == 7
    assert "2.4 (2.16, 2.64)" in full


def test_the_last_run_on_another_device_stays_in_short(make: Make) -> None:
    runs = [
        run(f"2026-01-0{day}", row("longnet-128k", "ours", ms), device=device)
        for day, device, ms in ((1, "Old GPU", 3.5), (2, "Old GPU", 3.25), (3, "New GPU", 2.125))
    ]
    newest, other = make(*runs)("docs/performance.md", "measurements").split("### Old GPU")
    assert "2.125" in newest and "3.25" not in newest
    assert "| longnet-128k | fwd | **3.25** |" in other and "2026-01-02" in other
    assert "New GPU" not in other and "2.12" not in other


def test_ring_table_compares_with_one_gpu_of_the_same_commit_and_day(make: Make) -> None:
    def ring(
        strategy: str, pass_: str, ms: float, exposed: float | None, by: str = "direct"
    ) -> Any:
        size = 1 if strategy == "one-rank" else 2
        who = {"workload": "llm-128k", "causal": True, "strategy": strategy, "world_size": size}
        times = {"pass": pass_, "ms": ms, "ms_p10": ms, "ms_p90": ms, "exposed_comm_ms": exposed}
        return {**who, **times, "bytes_per_rank": 2**20, "peak_mib": 7.0, "transport": by}

    first = [ring("one-rank", "fwd", 20.0, None), ring("one-rank", "fwd+bwd", 80.0, None)]
    second = [ring("ring", "fwd", 10.0, 0.25), ring("ring", "fwd+bwd", 50.0, -0.001)]
    second += [ring("one-rank", "fwd", 30.0, None), ring("ring", "fwd", 8.0, 0.0, "copy engine")]
    protocol = {"turns": 3, "launches_a_turn": 7, "settle_seconds": 0.25}
    shared = {"protocol": protocol, "ceilings": None}
    runs = run("2026-01-01T01", *first, **shared), run("2026-01-01T02", *second, **shared)
    said = make(*runs, name="ring")("docs/ring.md", "measurements")
    assert said.count("3 turns of 7 launches, each after 0.25 s.") == 1 and "Test GPU" in said
    assert [line[1:] for line in cells(said, "llm-128k, causal")] == [
        ["ring", "2", "10", "2.00", "50", "1.60", "2.5 / 0.0", "1 / 1", "7"],
        ["ring, copy engine", "2", "8", "2.50", "-", "-", "0.0 / -", "1 / -", "-"],
        ["one-rank", "1", "20", "-", "80", "-", "- / -", "1 / 1", "7"],
    ]


def test_writing_twice_changes_nothing(tree: Path) -> None:
    save(tree, run("2026-01-01", row("seed-1024", "ours", 1.0)))
    said: list[str] = []
    report.main(tree, lambda text: None)
    report.main(tree, said.append)
    unchanged = [line for line in said if "unchanged" in line]
    assert unchanged == [f"{name}: unchanged" for name in DOCUMENTS]


def test_a_line_comes_from_the_newest_run_as_a_whole(tree: Path) -> None:
    old = run("2026-01-01", row("seed-4096", "ours", 2.0), row("seed-4096", "torchscale", 9.0))
    new = run("2026-01-02", row("seed-4096", "ours", 1.0))
    only_peer = run("2026-01-03", row("seed-4096", "torchscale", 8.0))
    documents = report.load(save(tree, only_peer, new, old), "ops")
    chosen = tables.newest(documents, "seed-4096")
    assert chosen is not None and chosen["rows"] == new["rows"]
    said = tables.summary_section(documents)
    assert "**1**" in said and "| 9 |" not in said


def test_a_run_beside_the_bounds_alone_has_a_table_of_its_own(make: Make) -> None:
    peers = [row("llm-128k", impl, ms) for impl, ms in (("ours", 2.0), ("torchscale", 9.0))]
    bounds = [
        row("llm-128k", impl, ms, **{"pass": pass_})
        for impl, pass_, ms in (
            *(("ours", "fwd", 4.0), ("ours", "bwd", 10.0)),
            *(("library-bound-cudnn", "fwd", 6.0), ("library-bound-cudnn", "bwd", 12.5)),
            ("library-bound-fa4", "fwd", 5.0),
        )
    ]
    text = make(run("2026-01-01", *peers), run("2026-01-02", *bounds, commit="fedcba9876543210"))
    assert "| 4 | 5 | 1.25 | 10 | 12.5 | 1.25 |" in text("docs/performance.md", "bounds")
    assert "fedcba987654" in text("docs/performance.md", "bounds")
    assert "| **2** |" in text("docs/performance.md", "summary")
    assert "fedcba987654" not in text("docs/performance.md", "summary")


def test_a_run_counts_for_the_workloads_that_it_has_peers_on(tree: Path) -> None:
    first = run(
        "2026-01-01",
        *(row(name, "ours", 2.0) for name in ("llm-128k", "gigapath-10k", "slides-200k")),
        *(row(name, "torchscale", 9.0) for name in ("llm-128k", "gigapath-10k")),
        row("slides-200k", "ours-each", 9.0),
    )
    second = run(
        "2026-01-02",
        *(row(name, "ours", 4.0) for name in ("llm-128k", "gigapath-10k", "slides-200k")),
        row("llm-128k", "library-bound-cudnn", 5.0),
        row("slides-200k", "ours-each", 9.0),
        commit="fedcba9876543210",
    )
    documents = report.load(save(tree, first, second), "ops")
    for name, expected in (("llm-128k", first), ("gigapath-10k", first), ("slides-200k", second)):
        chosen = tables.newest(documents, name)
        assert chosen is not None and chosen["commit"] == expected["commit"], name


def test_bounds_without_other_runs_are_the_summary(make: Make) -> None:
    rows = [row("llm-128k", impl, ms) for impl, ms in (("ours", 4.0), ("library-bound-fa4", 5.0))]
    text = make(run("2026-01-01", *rows))
    assert "| **4** |" in text("docs/performance.md", "summary")
    assert "No measurement" in text("docs/performance.md", "bounds")


def test_runs_on_a_cpu_have_a_table_of_their_own(tree: Path) -> None:
    times = (("ours", 114.2), ("full-attention", 978.4))
    rows = [row("cpu-16k", impl, ms, causal=True) for impl, ms in times]
    cpu = {"device": "A CPU", "device_type": "cpu", "threads": 1}
    folder = save(tree, run("2026-01-01", *rows, **cpu))
    assert report.load(folder, "ops") == []
    found = report.load(folder, "ops", "cpu")
    ((*first, rate),) = cells(cpu_section(found), "cpu-16k")
    assert first[:3] == ["cpu-16k, causal", "1 x 16384 x 4 x 64, float32", "1"]
    assert first[3:] == ["fwd", "114.2", "978.4"] and 80 < int(rate) < 100
    gpu = [run("2026-01-01", row("longnet-128k", "ours", 1.0))]
    assert (
        "On a CPU (A CPU, one thread, float32, causal, 4 heads x 64): 16,384 positions in 114 ms, "
        "PyTorch's full attention 978."
    ) in readme_section(gpu, found)
    assert "On a CPU" not in readme_section(gpu, [{**found[0], "threads": 2}])


def test_readme_says_who_is_fastest_and_what_it_costs() -> None:
    rows = [
        row("longnet-128k", "ours", 4.5),
        row("longnet-128k", "ours", 16.0, peak_mib=1164.0, **BOTH),
        row("longnet-128k", "sdpa-views", 4.25),
        row("longnet-128k", "sdpa-views", 17.0, peak_mib=2275.0, **BOTH),
        row("longnet-128k", "torchscale", 19.0),
        row("seed-1024", "ours", 0.036),
        row("seed-1024", "ours-graph", 0.02),
        row("seed-1024", "sdpa-views", 0.03),
    ]
    text = readme_section([run("2026-01-01", *rows)], [])
    first, second = text.splitlines()[4:6]
    assert "| 4.5 / **16** | 19 / - | **4.25** / 17 | 1164 / - |" in first
    assert "| **0.02** (call 0.036) / - | - | 0.03 / - | - / - |" in second
    assert (
        "Faster: PyTorch's kernels branch by branch at `longnet-128k` (4.25 / 17 ms against "
        "4.5 / 16, 2275 MiB against 1164), each shape captured as a CUDA graph."
    ) in text
    assert "Test GPU, torch 2.11.0. Commit 0123456789ab, 2026-01-01." in text
    rows[6]["impl"] = "flex"  # not measured as a graph
    text = readme_section([run("2026-01-01", *rows)], [])
    assert "| call 0.036 / - |" in text and "`seed-1024` (0.03 / - ms against 0.036 / -" in text


def test_sections_must_be_there_once() -> None:
    changed = report.replace_section("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new")
    assert changed == "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    for text in ("", "<!-- x -->", "<!-- /x -->\n<!-- x -->", "<!-- x --><!-- x --><!-- /x -->"):
        with pytest.raises(ValueError, match="<!-- x --> and then <!-- /x -->"):
            report.replace_section(text, "x", "new")


def scales(factor: float = 1.0) -> dict[str, Any]:
    peers = (("torchscale", 3.0), ("ours", 1.0))
    rows = [
        row(f"scale-{kilo}k", impl, kilo * times * factor, peak_mib=456.0 * factor)
        for kilo in (16, 8)
        for impl, times in peers
    ]
    return run("2026-01-01", *rows, row("longnet-128k", "ours", 3.0 * factor))


def test_plots_have_a_point_for_every_length() -> None:
    measured = [(WORKLOADS[name], scales()) for name in ("scale-16k", "scale-8k")]
    least = [max(floors(w, False, "fwd", CEILINGS)) for w, _ in measured[::-1]]
    assert points(measured, "ms") == {
        "ours": [(8192, 8.0), (16384, 16.0)],
        "torchscale": [(8192, 24.0), (16384, 48.0)],
        "floor": list(zip((8192, 16384), least, strict=True)),
    }
    assert points(measured, "peak_mib")["ours"] == [(8192, 456.0), (16384, 456.0)]


def test_a_picture_names_the_lengths_of_another_device(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ("scale-8k", "scale-16k", "scale-32k")
    documents = [scales(), scales(), {**scales(), "device": "GPU Y"}]
    measured = [(WORKLOADS[name], each) for name, each in zip(names, documents, strict=True)]
    draw_lengths(measured, tmp_path)
    text = (tmp_path / "time.svg").read_text()  # a picture's words are comments in it
    assert "LongNet's branches, 1 x N x 12 x 64" in text
    assert f"{scales()['device']}; 32K: GPU Y" in text


def test_figures_are_reproducible(make: Make, tree: Path) -> None:
    pytest.importorskip("matplotlib")

    def drawn(document: dict[str, Any]) -> list[bytes]:
        make(document)
        names = ("figures/time.svg", "figures/memory.svg", "speed.svg")
        return [(tree / "docs" / name).read_bytes() for name in names]

    first, again, other = drawn(scales()), drawn(scales()), drawn(scales(1.5))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_a_file_is_replaced_whole_and_has_a_line_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ops-x.json"
    files.write(path, {"rows": [{"ms": 1}]})
    files.write(path, {"a": {"b": 1}, "rows": [{"ms": 2}, {"ms": 3}], "skipped": []})
    assert path.read_text().splitlines()[3:5] == ['  {"ms": 2},', '  {"ms": 3}']
    assert json.loads(path.read_text())["rows"] == [{"ms": 2}, {"ms": 3}]
    assert [p.name for p in path.parent.iterdir()] == ["ops-x.json"]
