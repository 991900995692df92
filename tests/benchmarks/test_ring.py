"""The ring's benchmark on two processes over gloo, and the drawing of its traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench, plots

ROOT = Path(__file__).parents[2]
COLUMNS = (
    *("workload", "causal", "strategy", "world_size", "pass", "ms", "ms_p10", "ms_p90"),
    *("exposed_comm_ms", "bytes_per_rank", "peak_mib", "transport"),
)


def test_two_processes_write_rows_of_every_peer(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--device", "cpu", "--workloads", "longnet-32k,longnet-128k", "--seq-len", "256"]
    options += ["--repeats", "2", "--out", str(tmp_path), "--trace", str(tmp_path / "trace")]
    options += ["--commit", "none", "--tag", "try", "--settle-seconds", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "benchmarks.bench", "ring", *options],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("ring-*-try.json")
    document = json.loads(path.read_text())
    assert document["world_size"] == 2 and document["commit"] == "none"
    assert document["protocol"] == {"turns": 3, "launches_a_turn": 1, "settle_seconds": 0}
    rows = document["rows"]
    for row in rows:
        assert list(row) == list(COLUMNS)
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["peak_mib"] is None
    measured = {row["strategy"] for row in rows}
    assert measured == {
        *("auto", "ring", "gather", "all_to_all", "one-rank", "all-gather"),
        *("zigzag-ring", "zigzag-gather"),
    }
    assert {row["strategy"] for row in document["skipped"]} == {
        *("torch-context-parallel", "zigzag-ring", "zigzag-gather")  # causal calls alone
    }
    sent = {(row["strategy"], row["pass"]): row["bytes_per_rank"] for row in rows}
    assert sent["ring", "fwd"] == sent["gather", "fwd"] > 0
    assert sent["one-rank", "fwd"] == 0
    assert sent["ring", "fwd"] <= sent["all-gather", "fwd"]
    assert {row["world_size"] for row in rows} == {1, 2}
    (trace,) = (tmp_path / "trace").glob("longnet-32k-ring-full-rank0.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert any(event.get("name") == plots.DRAWN for event in events)


def test_timeline_counts_what_is_exposed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    events = [
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_SendRecv", "ts": 10, "dur": 10},
        {"ph": "X", "cat": "kernel", "name": "attention_forward", "ts": 0, "dur": 15},
        {"ph": "X", "cat": "kernel", "name": "attention_forward", "ts": 18, "dur": 10},
        {"ph": "X", "cat": "cpu_op", "name": "dilated::attention", "ts": 0, "dur": 99},
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_SendRecv", "ts": -30, "dur": 20},
        {"ph": "X", "cat": "user_annotation", "name": "drawn", "ts": -5, "dur": 40},
        {"ph": "M", "name": "process_name"},
    ]
    intervals = plots.read_trace({"traceEvents": events})
    assert intervals == {"exchange": [(10, 20)], "compute": [(0, 15), (18, 28)]}
    of_exchange, of_whole = plots.exposed(intervals["exchange"], intervals["compute"])
    assert (of_exchange, of_whole) == (pytest.approx(3 / 10), pytest.approx(3 / 28))
    trace, picture = tmp_path / "trace.json", tmp_path / "figures" / "ring.svg"
    trace.write_text(json.dumps({"traceEvents": events, "deviceProperties": [{"name": "GPU X"}]}))
    bench.main(["timeline", str(trace), str(picture)])
    text = picture.read_text()  # a picture's words are comments in it
    assert "trace, GPU X" in text and "30% of the exchange, 10.7% of the time" in text
