"""Draws time and memory against the length of the sequence, from the "scale-N" workloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .schema import IMPLS
from .workloads import Ceilings, Workload, floor

Measured = Sequence[tuple[Workload, dict[str, Any]]]
Points = dict[str, list[tuple[int, float]]]

_FLOOR = "floor"


def points(measured: Measured, field: str) -> Points:
    """Per implementation, (seq_len, value) of the forward under sustained load, by length."""
    found: Points = {}
    for workload, document in measured:
        for row in document["rows"]:
            if (row["workload"], row["pass"], row["protocol"]) != (
                workload.name,
                "fwd",
                "sustained",
            ):
                continue
            if row.get(field) is not None:
                found.setdefault(row["impl"], []).append((workload.seq_len, float(row[field])))
            if field == "ms" and row["impl"] == "ours":
                least = floor(workload, row["causal"], "fwd", Ceilings(**document["ceilings"]))
                found.setdefault(_FLOOR, []).append((workload.seq_len, least.ms))
    order = (*IMPLS, _FLOOR)
    return {name: sorted(found[name]) for name in order if name in found}


def draw(measured: Measured, folder: Path) -> None:
    """time.svg and memory.svg; the same measurements give the same files, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    _draw(points(measured, "ms"), "milliseconds, forward", folder / "time.svg")
    _draw(points(measured, "peak_mib"), "MiB beyond the inputs, forward", folder / "memory.svg")


def _draw(series: Points, label: str, path: Path) -> None:
    import matplotlib  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "dilated"
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        style = "k--" if name == _FLOOR else "o-"
        weight = 2.5 if name == "ours" else 1.2
        axes.loglog(*zip(*values, strict=True), style, label=name, linewidth=weight, markersize=4)
    lengths = sorted({length for values in series.values() for length, _ in values})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set_xlabel("positions")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
