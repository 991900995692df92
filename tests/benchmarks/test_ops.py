"""`bench ops` and `bench plan` from their command line, on workloads that take milliseconds."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, ops, plan, results
from benchmarks.peers import Impl, make_impls, ours
from benchmarks.peers.calls import Calls, Inputs, UnsupportedError
from benchmarks.workloads import WORKLOADS, Workload

TINY = Workload("seed-1024", "seed", 64, 4, 16, (16, 32), (1, 2), causal=(False, True))
FAST = ["--device", "cpu", "--seconds", "0.002", "--repeats", "1", "--commit", "c0ffee"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work on many threads takes longer than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"matmul_tflops": 1.0, "copy_gbps": 10.0}
    monkeypatch.setattr(ops, "measure_ceilings", lambda stopwatch: found)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "seed-1024", TINY)


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    bench.main(["ops", *FAST, "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.iterdir()
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.mark.usefixtures("tiny")
def test_writes_a_row_for_every_pass_and_protocol(tmp_path: Path) -> None:
    names = ["--workloads", "seed-1024", "--impls", "ours,sdpa-views,library-bound-cudnn,flex"]
    document = run(tmp_path, *names, "--tag", "a b")
    (path,) = tmp_path.iterdir()
    device = results.slug(document["device"])
    assert path.name == f"ops-{device}-{document['date'][:10]}-a-b.json"
    rows = [r for r in document["rows"] if r["pass"] != "host"]
    impls = ("ours", "sdpa-views", "library-bound-cudnn")
    kinds = ((False, True), impls, ("fwd", "bwd", "fwd+bwd"), ("sustained", "isolated"))
    found = {(r["causal"], r["impl"], r["pass"], r["protocol"]) for r in rows}
    assert found == set(itertools.product(*kinds))
    assert {r["impl"] for r in document["rows"] if r["pass"] == "host"} == {"ours"}
    assert document["commit"] == "c0ffee" and document["complete"]
    views = [r for r in document["rows"] if r["impl"] == "sdpa-views"]
    assert all(0 < r["relative_error"] < 0.03 for r in views)


@pytest.mark.usefixtures("tiny")
def test_a_peer_that_is_wrong_is_named_and_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        return Calls(lambda: inputs.value * 2)

    def broken(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        raise RuntimeError("no kernel")

    impls = {
        "ours": make_impls(None)["ours"],
        "torchscale": Impl("torchscale", broken),
        "sdpa-views": Impl("sdpa-views", wrong),
    }
    monkeypatch.setattr(ops, "make_impls", lambda torchscale: impls)
    document = run(tmp_path, "--workloads", "seed-1024", "--passes", "fwd")
    assert {row["impl"] for row in document["rows"]} == {"ours"}
    reasons = {entry["impl"]: entry["reason"] for entry in document["skipped"]}
    assert "fwd differs from ours by" in reasons["sdpa-views"]
    assert reasons["torchscale"] == "RuntimeError: no kernel"


@pytest.mark.usefixtures("tiny")
def test_peers_with_graphs_are_captured_once_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured: list[object] = []

    def capture(launch: Callable[[], object], device: torch.device) -> Callable[[], object]:
        captured.append(launch)
        return launch

    impls = {"ours": make_impls(None)["ours"], "ours-graph": Impl("ours-graph", ours, graphed=True)}
    monkeypatch.setattr(ops, "captured", capture)
    monkeypatch.setattr(ops, "make_impls", lambda torchscale: impls)
    document = run(tmp_path, "--workloads", "seed-1024", "--passes", "fwd,fwd+bwd,host")
    assert len(captured) == 4  # two passes, causal or not
    rows = [row for row in document["rows"] if row["impl"] == "ours-graph"]
    assert {row["pass"] for row in rows} == {"fwd", "fwd+bwd"}
    assert all(row["relative_error"] == 0 for row in rows)


def test_batches_are_for_peers_that_take_them(tmp_path: Path) -> None:
    names = ["--workloads", "cpu-batches", "--impls", "ours,ours-each,ours-padded,sdpa-views"]
    document = run(tmp_path, *names, "--passes", "fwd,fwd+bwd", "--protocols", "sustained")
    found = {(row["impl"], row["pass"], row["causal"]) for row in document["rows"]}
    impls = ("ours", "ours-each", "ours-padded")
    assert found == set(itertools.product(impls, ("fwd", "fwd+bwd"), (False, True)))
    each = [row for row in document["rows"] if row["impl"] == "ours-each"]
    assert all(row["relative_error"] < 1e-5 for row in each)
    reasons = {entry["impl"]: entry["reason"] for entry in document["skipped"]}
    assert reasons == {"sdpa-views": "it takes one sequence at a time"}


def test_ours_is_captured_on_gpus_only() -> None:
    impl = make_impls(None)["ours-graph"]
    inputs = Inputs.make(TINY, torch.device("cpu"))
    with pytest.raises(UnsupportedError, match="short beside the host's time"):
        impl.prepare(TINY, False, inputs)


@pytest.mark.usefixtures("tiny")
def test_when_the_time_is_up_the_file_says_what_is_missing(tmp_path: Path) -> None:
    document = run(tmp_path, "--workloads", "seed", "--impls", "ours", "--budget-seconds", "0")
    assert document["rows"] == [] and not document["complete"]
    waiting = [(entry["workload"], entry["causal"]) for entry in document["skipped"]]
    assert waiting == [
        ("seed-1024", False), ("seed-1024", True), ("seed-4096", False), ("seed-16384", False)
    ]  # fmt: skip


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_leaves_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = ops.Case.measure

    def interrupted(case: ops.Case, impls: list[Impl]) -> None:
        if case.causal:
            raise SystemExit(143)
        measure(case, impls)

    monkeypatch.setattr(ops.Case, "measure", interrupted)
    with pytest.raises(SystemExit):
        run(tmp_path, "--workloads", "seed-1024", "--impls", "ours", "--passes", "fwd")
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert [row["causal"] for row in document["rows"]] == [False, False]
    assert [entry["causal"] for entry in document["skipped"]] == [True]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--impls", "ours,theirs"], "--impls: must be among ours, .* got theirs"),
        (["--passes", "forward"], "--passes: must be among fwd, .* got forward"),
        (["--protocols", ","], "--protocols: must be among sustained, isolated, got none"),
        (["--workloads", "nothing"], "--workloads: must be among .* got nothing"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    ],
)
def test_command_line_names_what_it_does_not_know(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse(["ops", *arguments])
    assert re.search(complaint, capsys.readouterr().err)


def test_a_run_on_a_cpu_takes_its_workloads_and_says_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cpu-4k", "cpu-16k"):
        monkeypatch.setitem(WORKLOADS, name, replace(TINY, name=name, group="cpu"))
    document = run(tmp_path, "--passes", "fwd", "--threads", "1")
    assert document["threads"] == 1 and document["device_type"] == "cpu"
    assert {row["workload"] for row in document["rows"]} == {"cpu-4k", "cpu-16k"}
    said = capsys.readouterr().out.splitlines()
    assert "on a CPU: times of the CPU kernels" in said[0]
    assert len(said) == 1 + 4 + 1  # the sentence, a line for each workload, the file
    assert re.search(r"cpu-16k, causal: ours [\d.]+, .* ms$", said[-2])


def test_relative_error_of_nan_passes_nothing() -> None:
    error = ops.relative_error(torch.tensor([torch.nan]), torch.tensor([1.0]))
    assert not error <= 1.0
    assert ops.relative_error(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])) == 1.0


def test_a_run_knows_its_commit_and_a_file_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    assert results.find_commit(None) == "unknown"
    assert results.find_commit("beef") == "beef"
    assert results.slug("Intel(R) Xeon(R) @ 2.60GHz") == "intel-r-xeon-r-2-60ghz"


def test_planning_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "plan_workloads", lambda: iter([TINY]))
    batch = plan._packed(TINY.spec(True), [20, 30, 20])
    monkeypatch.setattr(plan, "plan_batches", lambda: iter([("batch", batch)]))
    arguments = ["--out", str(tmp_path), "--commit", "c0ffee", "--seconds", "0.001"]
    bench.main(["plan", *arguments])
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert [row["causal"] for row in document["rows"]] == [False, True, True, True]
    assert [row["seq_len"] for row in document["rows"][2:]] == [70, 70]
    row = document["rows"][0]
    assert row["distinct"] <= row["nominal"] and row["bytes"] > 0 and row["ms"] > 0
    section = plan.planning_section([document])
    assert "| seed-1024 | yes |" in section and "| batch, known lengths | yes |" in section
