"""The example that writes a million bytes, on some hundreds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest


def test_speed_and_memory_are_measured_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("write_million")
    small = {"width": 16, "layers": 2, "num_heads": 2}
    branches = {"segment_lengths": (16, 64), "dilation_rates": (1, 4)}
    monkeypatch.setattr(example, "SHAPE", small | branches)
    found, picture = tmp_path / "found.json", tmp_path / "found.svg"
    for arguments in (
        ["--bytes", "1200", "--device", "cpu", "--out", str(found)],
        ["--plot", str(found), str(picture)],
    ):
        monkeypatch.setattr(sys, "argv", ["write_million.py", *arguments])
        example.main()
    figures = json.loads(found.read_text())
    forgets = figures["forgets"]
    assert [row["position"] for row in forgets] == list(range(12, 1201, 12))
    (kept,) = {row["cache_bytes"] for row in forgets}
    assert kept == 2 * 2 * 2 * (16 + 48 // 4) * 8 * 4  # layers, key and value, heads, rows
    (dense,) = figures["dense"]
    assert dense["position"] == 1024 and dense["cache_bytes"] == 2 * 2 * 2 * 1024 * 8 * 4
    assert "cache that forgets" in picture.read_text() or picture.stat().st_size > 5000
