"""`bench decode` from its command line, on a shape that takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench, decode

SMALL = decode.Shape(4, 2, 8, (8, 32), (1, 2), 128)


def test_every_way_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "Shape", lambda: SMALL)
    monkeypatch.setattr(decode, "BATCHES", (1, 2))
    monkeypatch.setattr(decode, "POSITIONS", 4)
    monkeypatch.setattr(
        decode, "measure_ceilings", lambda _: {"copy_gbps": 10.0, "matmul_tflops": 1.0}
    )
    options = ["--device", "cpu", "--commit", "c0ffee", "--out", str(tmp_path)]
    bench.main(["decode", *options])
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    rows = document["rows"]
    ours = [
        ("forgets", offsets, where)
        for offsets in ("interleaved", "shared by a group")
        for where in ("window", "last")
    ]
    ways = [*ours, ("full", "interleaved", "last"), ("sdpa", "interleaved", "last")]
    assert [(row["batch"], row["impl"], row["offsets"], row["where"]) for row in rows] == [
        (batch, *way) for batch in (1, 2) for way in ways
    ]
    assert all(row["ms"] > 0 and row["gbps"] > 0 for row in rows)
    full, dense = rows[4]["cache_mib"], rows[5]["cache_mib"]
    assert full == dense == 2 * 2 * 128 * 8 * 4 / 2**20 > rows[0]["cache_mib"]
    section = decode.decode_section([document])
    assert section.count("\n| ") >= len(rows) and "forgets, offsets interleaved" in section


def test_distinct_rows_are_counted_once() -> None:
    # At 127: 8 rows of the first branch; of the second, on the lattice of odd positions, 16, of
    # which 4 are among the 8. Both KV heads have a head with offset 1.
    assert SMALL.distinct_rows("interleaved", 127) == 2 * (8 + 16 - 4)
    assert SMALL.distinct_rows([[0] * 4, [0, 0, 1, 1]], 127) == 8 + (8 + 16 - 4)
    assert SMALL.distinct_rows([[0] * 4, [0] * 4], 127) == 2 * 8


def test_a_window_has_positions_of_all_residues() -> None:
    window = decode.Shape().window()
    assert len(window) == 64 and window[0] == 98304 and window[-1] < 131072
    assert {position % 16 for position in window} == set(range(16))
