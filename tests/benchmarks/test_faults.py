"""`bench faults` on two processes over gloo, and the table of its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench, faults, faulty_ranks
from benchmarks.faulty_ranks import WENT_ON, WRONG, see
from tests.benchmarks.test_report import cells

LATE = "RuntimeError: rank 1 did not come within 5.0 s to compare arguments: dead, slower"
EARLIER = f"RuntimeError: an earlier call over the group failed: {LATE}"


def test_two_processes_see_a_death_and_a_refusal(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--ranks", "2", "--timeout", "60", "--out", str(tmp_path)]
    bench.main(["faults", *options, "--commit", "none", "--faults", "killed-in-backward,refused"])
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert (document["world_size"], document["backend"]) == (2, "gloo")
    assert document["timeout_seconds"] == 60
    killed, refused = document["rows"]
    assert killed["fault"] == "killed-in-backward" and killed["rank"] == refused["rank"] == 0
    assert killed["saw"].startswith("RuntimeError: an exchange failed: a rank is dead")
    assert killed["next"].startswith("RuntimeError: an earlier call over the group failed: ")
    assert refused["saw"].startswith("Disagreement: rank 1 refused its arguments: ValueError: scal")
    assert refused["next"] == WENT_ON
    assert all(row[f"{when}_seconds"] >= 0 for row in (killed, refused) for when in ("saw", "next"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ranks", "1"], "--ranks: must be at least 2, got 1"),
        (["--ranks", "4", "--device", "cuda"], "--ranks: must be at most 2, one for each GPU, got"),
        (["--timeout", "0"], "--timeout: must be positive, got 0"),
        (["--faults", "killed"], "must be among killed-before, "),
    ],
)
def test_wrong_options_are_refused(
    options: list[str],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        bench.main(["faults", "--device", "cpu", "--out", str(tmp_path), *options])
    assert text in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wrong_result_is_seen_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> torch.Tensor:
        return torch.ones(2)

    monkeypatch.setattr(faulty_ranks._Rank, "expected", {call: torch.ones(2)}, raising=False)
    assert see(call, True)[0] == WENT_ON
    faulty_ranks._Rank.expected[call] = torch.zeros(2)
    assert [see(call, reads)[0] for reads in (True, False)] == [WRONG, WENT_ON]


def run(backend: str, *rows: dict[str, Any]) -> dict[str, Any]:
    what = {"commit": "0123456789abcdef", "date": "2026-01-01", "device": f"Test {backend}"}
    what |= {"backend": backend, "world_size": 3, "timeout_seconds": 5.0}
    return {**what, "versions": {"torch": "2.11.0"}, "rows": list(rows)}


def row(rank: int, saw: str, then: str | None, **change: Any) -> dict[str, Any]:
    seconds = {"saw_seconds": 0.1 + rank, "next_seconds": None if then is None else 0.01}
    what = {"fault": "away", "reads": True, "world_size": 3, "rank": rank, **change}
    return {**what, "saw": saw, "next": then, **seconds}


def test_ranks_that_see_the_same_are_one() -> None:
    gloo = [row(rank, LATE, EARLIER) for rank in (0, 2)]
    gloo += [
        row(0, "goes on", "goes on", fault="refused"),
        row(2, LATE, "goes on", fault="refused"),
    ]
    late, refused = cells(faults.faults_section([run("gloo", *gloo)]), "")[2:]
    then = "RuntimeError: an earlier call over the group failed (0.0)"
    late_text = "RuntimeError: rank 1 did not come"
    assert late == ["does not come to a call", f"{late_text} (0.1 to 2.1)", then]
    assert refused[1:] == [f"rank 0: goes on (0.1); rank 2: {late_text} (2.1)", "goes on (0.0)"]


def test_both_backends_share_a_table() -> None:
    end = "its process ends by SIGABRT"
    nccl = [
        row(0, end, None),
        row(0, "goes on", LATE, reads=False),
        row(0, LATE, None, world_size=2),
    ]
    said = faults.faults_section([run("gloo", row(0, LATE, None)), run("nccl", *nccl)])
    head, _, late, unread = cells(said, "")
    assert head[1:] == ["over gloo", "over NCCL", "NCCL, next call"]
    late_text = "RuntimeError: rank 1 did not come"
    assert late[1:] == [f"{late_text} (0.1)", f"{end} (0.1)", "-"]
    assert unread == [
        "does not come to a call; results are not read",
        *("-", "goes on (0.1)", f"{late_text} (0.0)"),
    ]
    assert "* 3 ranks over nccl, timeout 5 s; Test nccl; torch 2.11.0. Commit 0123456789ab" in said
