"""What the documents say about speed is what the committed results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, tables
from benchmarks import results as files
from benchmarks.plots import points
from benchmarks.readme_tables import cpu_section, readme_section
from benchmarks.results import RESULTS, ROOT
from benchmarks.workloads import WORKLOADS, Ceilings, floor

DOCUMENTS = ("README.md", "docs/performance.md", "docs/ring.md", "docs/caches.md")
CEILINGS = {"matmul_tflops": 500.0, "copy_gbps": 2000.0}


def make_row(workload: str, impl: str, ms: float, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "workload": workload,
        "causal": False,
        "impl": impl,
        "pass": "fwd",
        "protocol": "sustained",
        "ms": ms,
        "ms_p10": ms * 0.9,
        "ms_p90": ms * 1.1,
        "nominal_tflops": 123.0,
        "peak_mib": 456.0,
        "sm_mhz": 1500.0,
        "watts": 690.0,
        "launches": 10,
    }
    return {**row, **changes}


def make_document(date: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    document: dict[str, Any] = {
        "commit": "0123456789abcdef",
        "device": "Test GPU",
        "device_type": "cuda",
        "driver": "1.2.3",
        "versions": {"torch": "2.11.0", "cudnn": "91900"},
        "clocks": {"power_limit_watts": 700.0},
        "date": date,
        "ceilings": CEILINGS,
        "rows": rows,
        "skipped": [],
    }
    return {**document, **changes}


def save(folder: Path, name: str, document: dict[str, Any]) -> None:
    files.write(folder / name, document)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the documents, whose sections are empty, and no results."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in DOCUMENTS:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def section(path: Path, name: str) -> str:
    """What stands between the comments `name` and `/name`."""
    return path.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def results(tree: Path) -> Path:
    return tree / "benchmarks" / "results"


def test_runs_of_one_commit_are_one(tree: Path) -> None:
    first = [make_row("longnet-128k", "ours", 2.0), make_row("longnet-128k", "torchscale", 9.0)]
    second = [make_row("longnet-128k", "ours", 3.0), make_row("longnet-128k", "sdpa-views", 4.0)]
    save(results(tree), "ops-a.json", make_document("2026-01-02T01:00:00", first))
    save(results(tree), "ops-b.json", make_document("2026-01-02T02:00:00", second))
    other = make_document("2026-01-02T03:00:00", [], commit="f" * 16)
    save(results(tree), "ops-c.json", other)
    joined, last = report.load(results(tree))
    assert [(row["impl"], row["ms"]) for row in joined["rows"]] == [
        ("ours", 2.0),
        ("torchscale", 9.0),
        ("sdpa-views", 4.0),
    ]
    assert last["commit"] == "f" * 16


def test_ceilings_are_those_of_the_run_with_most_rows(tree: Path) -> None:
    few, many = (
        [make_row("seed-1024", "ours", 1.0)],
        [make_row("longnet-128k", "ours", 2.0), make_row("longnet-128k", "torchscale", 9.0)],
    )
    other = {"matmul_tflops": 600.0, "copy_gbps": 2500.0}
    save(results(tree), "ops-a.json", make_document("2026-01-02T01", few))
    save(results(tree), "ops-b.json", make_document("2026-01-02T02", many, ceilings=other))
    save(results(tree), "ops-c.json", make_document("2026-01-02T03", few))
    (joined,) = report.load(results(tree))
    assert joined["ceilings"] == other and len(joined["rows"]) == 3


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_say_what_the_committed_results_say(name: str) -> None:
    for marker, body in report.sections(RESULTS)[name].items():
        assert section(ROOT / name, marker) == body, "run python -m benchmarks.bench report"


def test_committed_results_are_what_the_schema_says() -> None:
    documents = report.load(RESULTS)
    assert all(document["commit"] != "unknown" for document in documents)
    known = {row["workload"] for document in documents for row in document["rows"]}
    assert known <= WORKLOADS.keys()


def test_without_results_the_documents_say_so(tree: Path) -> None:
    report.main(tree, lambda text: None)
    for name in DOCUMENTS:
        assert "No measurement is committed" in (tree / name).read_text()
    assert "longnet-128k" in section(tree / "docs/performance.md", "floors")


def test_table_holds_the_numbers_of_the_file(tree: Path) -> None:
    rows = [
        make_row("longnet-128k", "ours", 2.6543),
        make_row("longnet-128k", "torchscale", 18.24, peak_mib=1773.0),
        make_row("longnet-128k", "library-bound-cudnn", 3.55),
        make_row("longnet-128k", "library-bound-fa4", 3.44),
        make_row("longnet-128k", "ours", 2.4, protocol="isolated"),
        make_row("longnet-128k", "flex", 30.0, **{"pass": "fwd+bwd"}),
        make_row("longnet-128k", "ours", 9.0, **{"pass": "fwd+bwd"}),
        make_row("seed-1024", "ours", 0.0305, **{"pass": "host", "launch_ms": 0.0042}),
    ]
    save(results(tree), "ops-test-gpu-2026-01-01.json", make_document("2026-01-01", rows))
    report.main(tree, lambda text: None)
    said = section(tree / "docs/performance.md", "summary")
    table = [line for line in said.splitlines() if line.startswith("| ")]
    names, _, line, _ = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert line == [
        "longnet-128k",
        "fwd",
        "**2.65**",
        "123",
        "2.55, 96 %",
        "3.44",
        "-",
        "18.2",
        "456 / 1773",
    ]
    assert "flex" in names
    assert not {"sdpa-views", "full attention"} & set(names), (
        "columns without a figure are left out"
    )
    assert "takes 30 us of the host's time" in said and "takes 4 us" in said
    assert "Test GPU, driver 1.2.3; torch 2.11.0" in said and "0123456789ab" in said
    full = section(tree / "docs/performance.md", "measurements")
    assert full.count("| longnet-128k |") == 7
    assert "2.4 (2.16, 2.64)" in full


def test_the_last_run_on_another_device_stays_in_short(tree: Path) -> None:
    def save_run(name: str, date: str, device: str, ms: float) -> None:
        rows = [make_row("longnet-128k", "ours", ms)]
        save(results(tree), f"ops-{name}.json", make_document(date, rows, device=device))

    save_run("a", "2026-01-01", "Old GPU", 3.5)
    save_run("b", "2026-01-02", "Old GPU", 3.25)
    save_run("c", "2026-01-03", "New GPU", 2.125)
    report.main(tree, lambda text: None)
    full = section(tree / "docs/performance.md", "measurements")
    newest, other = full.split("### Old GPU")
    assert "2.125" in newest and "3.25" not in newest
    assert "| longnet-128k | fwd | **3.25** |" in other and "2026-01-02" in other
    assert "New GPU" not in other and "2.12" not in other


def test_the_run_with_the_most_rows_says_what_several_runs_measured(tree: Path) -> None:
    small = [make_row("longnet-128k", "ours", 3.5)]
    large = [make_row("longnet-128k", "ours", 2.125), make_row("llm-128k", "ours", 9.0)]
    save(results(tree), "ops-a.json", make_document("2026-01-01T01:00", small))
    save(results(tree), "ops-b.json", make_document("2026-01-01T02:00", large))
    report.main(tree, lambda text: None)
    table = section(tree / "docs/performance.md", "measurements")
    assert "2.12" in table and "3.5" not in table


def test_ring_table_compares_with_one_gpu_of_the_same_commit_and_day(tree: Path) -> None:
    def row(
        strategy: str, pass_: str, ms: float, exposed: float | None, transport: str = "direct"
    ) -> dict[str, Any]:
        size = 1 if strategy == "one-rank" else 2
        return {
            **{"workload": "llm-128k", "causal": True, "strategy": strategy, "world_size": size},
            **{"pass": pass_, "ms": ms, "ms_p10": ms, "ms_p90": ms, "exposed_comm_ms": exposed},
            **{"bytes_per_rank": 2**20, "peak_mib": 7.0, "transport": transport},
        }

    first = [row("one-rank", "fwd", 20.0, None), row("one-rank", "fwd+bwd", 80.0, None)]
    second = [row("ring", "fwd", 10.0, 0.25), row("ring", "fwd+bwd", 50.0, -0.001)]
    second.append(row("one-rank", "fwd", 30.0, None))
    second.append(row("ring", "fwd", 8.0, 0.0, "copy engine"))
    protocol = {"turns": 3, "launches_a_turn": 7, "settle_seconds": 0.25}
    for name, rows in (("a", first), ("b", second)):
        document = make_document(f"2026-01-01T0{name}", rows, protocol=protocol, ceilings=None)
        save(results(tree), f"ring-{name}.json", document)
    report.main(tree, lambda text: None)
    said = section(tree / "docs/ring.md", "measurements")
    assert said.count("3 turns of 7 launches, each after 0.25 s.") == 1
    lines = [line for line in said.splitlines() if line.startswith("| llm-128k")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["llm-128k, causal", "ring", "2", "10", "2.00", "50", "1.60", "2.5 / 0.0", "1 / 1", "7"],
        [
            "llm-128k, causal",
            "ring, copy engine",
            "2",
            "8",
            "2.50",
            "-",
            "-",
            "0.0 / -",
            "1 / -",
            "-",
        ],
        ["llm-128k, causal", "one-rank", "1", "20", "-", "80", "-", "- / -", "1 / 1", "7"],
    ]
    assert "Test GPU" in said


def test_writing_twice_changes_nothing(tree: Path) -> None:
    rows = [make_row("seed-4096", "ours", 1.0)]
    save(results(tree), "ops-test-gpu-2026-01-01.json", make_document("2026-01-01", rows))
    said: list[str] = []
    report.main(tree, said.append)
    report.main(tree, said.append)
    assert [line for line in said if "unchanged" in line] == [
        f"{name}: unchanged" for name in DOCUMENTS
    ]


def test_a_line_comes_from_the_newest_run_as_a_whole(tree: Path) -> None:
    old = [make_row("seed-4096", "ours", 2.0), make_row("seed-4096", "torchscale", 9.0)]
    new = [make_row("seed-4096", "ours", 1.0)]
    only_peer = [make_row("seed-4096", "torchscale", 8.0)]
    save(results(tree), "ops-a.json", make_document("2026-01-03", only_peer))
    save(results(tree), "ops-b.json", make_document("2026-01-02", new))
    save(results(tree), "ops-c.json", make_document("2026-01-01", old))
    documents = report.load(results(tree))
    chosen = tables.newest(documents, "seed-4096")
    assert chosen is not None and chosen["rows"] == new
    assert "**1**" in tables.summary_section(documents)
    assert "| 9 |" not in tables.summary_section(documents)


def test_runs_on_a_cpu_have_a_table_of_their_own(tree: Path) -> None:
    rows = [
        make_row("cpu-16k", "ours", 114.2, causal=True),
        make_row("cpu-16k", "full-attention", 978.4, causal=True),
    ]
    document = make_document("2026-01-01", rows, device="A CPU", device_type="cpu")
    save(results(tree), "ops-cpu.json", document | {"threads": 1})
    assert report.load(results(tree)) == []
    found = report.load(results(tree), device_type="cpu")
    line = next(line for line in cpu_section(found).splitlines() if "cpu-16k" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["cpu-16k, causal", "1 x 16384 x 4 x 64, float32", "1"]
    assert cells[3:7] == ["fwd", "114.2", "-", "978.4"] and 80 < int(cells[7]) < 100
    gpu = [make_document("2026-01-01", [make_row("longnet-128k", "ours", 1.0)])]
    assert (
        "On a CPU (A CPU, one thread, float32, causal, 4 heads x 64): 16,384 positions in 114 ms, "
        "PyTorch's full attention 978."
    ) in readme_section(gpu, found)
    many = [{**found[0], "threads": 2}]
    assert "On a CPU" not in readme_section(gpu, many)


def test_readme_says_who_is_fastest_and_what_it_costs() -> None:
    both = {"pass": "fwd+bwd"}
    rows = [
        make_row("longnet-128k", "ours", 4.5),
        make_row("longnet-128k", "ours", 16.0, peak_mib=1164.0, **both),
        make_row("longnet-128k", "sdpa-views", 4.25),
        make_row("longnet-128k", "sdpa-views", 17.0, peak_mib=2275.0, **both),
        make_row("longnet-128k", "torchscale", 19.0),
        make_row("seed-1024", "ours", 0.036),
        make_row("seed-1024", "ours-graph", 0.02),
        make_row("seed-1024", "sdpa-views", 0.03),
    ]
    text = readme_section([make_document("2026-01-01", rows)], [])
    first, second = text.splitlines()[4:6]
    assert "| 4.5 / **16** | 19 / - | **4.25** / 17 | - | 1164 / - |" in first
    assert "| **0.02** (call 0.036) / - | - | 0.03 / - | - | - / - |" in second
    assert (
        "Faster: PyTorch's kernels branch by branch at `longnet-128k` (4.25 / 17 ms against "
        "4.5 / 16, 2275 MiB against 1164), each shape captured as a CUDA graph."
    ) in text
    assert "Test GPU, torch 2.11.0. Commit 0123456789ab, 2026-01-01." in text
    rows[6]["impl"] = "flex"  # not measured as a graph
    text = readme_section([make_document("2026-01-01", rows)], [])
    assert "| call 0.036 / - |" in text and "`seed-1024` (0.03 / - ms against 0.036 / -" in text


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"impl": "theirs"}, r"rows\[0\]: impl must be among .* got 'theirs'"),
        ({"pass": "forward"}, "pass must be among"),
        ({"protocol": "burst"}, "protocol must be among"),
        ({"ms_p10": 5.0}, "must have ms_p10 <= ms <= ms_p90, got"),
    ],
)
def test_schema_refuses_wrong_rows(change: dict[str, Any], complaint: str) -> None:
    row = {**make_row("seed-4096", "ours", 1.0), **change}
    with pytest.raises(ValueError, match=complaint):
        files.check(make_document("2026-01-01", [row]))


@pytest.mark.parametrize("key", ["watts", "sm_mhz", "peak_mib", "nominal_tflops", "causal"])
def test_schema_refuses_missing_fields(key: str) -> None:
    row = make_row("seed-4096", "ours", 1.0)
    del row[key]
    with pytest.raises(ValueError, match=rf"rows\[0\]: \['{key}'\] must be there"):
        files.check(make_document("2026-01-01", [row]))
    document = make_document("2026-01-01", [])
    del document["commit"]
    with pytest.raises(ValueError, match=r"\['commit'\] must be there"):
        files.check(document)


def test_sections_must_be_there_once() -> None:
    assert report.replace_section("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", "new") == (
        "a\n<!-- x -->\nnew\n<!-- /x -->\nb"
    )
    for text in ("", "<!-- x -->", "<!-- /x -->\n<!-- x -->", "<!-- x --><!-- x --><!-- /x -->"):
        with pytest.raises(ValueError, match="<!-- x --> and then <!-- /x -->"):
            report.replace_section(text, "x", "new")


def scale_document() -> dict[str, Any]:
    rows = [
        make_row(f"scale-{kilo}k", impl, float(kilo) * factor)
        for kilo in (16, 8)
        for impl, factor in (("torchscale", 3.0), ("ours", 1.0))
    ]
    rows.append(make_row("longnet-128k", "ours", 3.0))
    return make_document("2026-01-01", rows)


def test_plots_have_a_point_for_every_length() -> None:
    document = scale_document()
    measured = [(WORKLOADS[name], document) for name in ("scale-16k", "scale-8k")]
    ceilings = Ceilings(**CEILINGS)
    small, large = (
        floor(WORKLOADS[name], False, "fwd", ceilings).ms for name in ("scale-8k", "scale-16k")
    )
    assert points(measured, "ms") == {
        "ours": [(8192, 8.0), (16384, 16.0)],
        "torchscale": [(8192, 24.0), (16384, 48.0)],
        "floor": [(8192, small), (16384, large)],
    }
    assert points(measured, "peak_mib")["ours"] == [(8192, 456.0), (16384, 456.0)]


def test_figures_are_reproducible(tree: Path) -> None:
    pytest.importorskip("matplotlib")
    save(results(tree), "ops-test-gpu-2026-01-01.json", scale_document())
    names = ("figures/time.svg", "figures/memory.svg", "speed.svg")
    figures = [tree / "docs" / name for name in names]
    report.main(tree, lambda text: None)
    first = [path.read_bytes() for path in figures]
    report.main(tree, lambda text: None)
    assert [path.read_bytes() for path in figures] == first
    document = scale_document()
    for row in document["rows"]:
        row |= {"ms": 1.0, "ms_p10": 1.0, "ms_p90": 1.0, "peak_mib": 1.0}
    save(results(tree), "ops-test-gpu-2026-01-01.json", document)
    report.main(tree, lambda text: None)
    assert all(path.read_bytes() != old for path, old in zip(figures, first, strict=True))


def test_a_file_is_replaced_whole_and_has_a_line_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ops-x.json"
    files.write(path, {"rows": [{"ms": 1}]})
    files.write(path, {"a": {"b": 1}, "rows": [{"ms": 2}, {"ms": 3}], "skipped": []})
    assert path.read_text().splitlines()[3:5] == ['  {"ms": 2},', '  {"ms": 3}']
    assert json.loads(path.read_text())["rows"] == [{"ms": 2}, {"ms": 3}]
    assert [p.name for p in path.parent.iterdir()] == ["ops-x.json"]


def test_committed_files_are_as_they_are_written(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        files.write(tmp_path / path.name, json.loads(path.read_text()))
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name
