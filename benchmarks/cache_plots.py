"""Draws the report on the caches: V3's time over V2's, and where a step's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .cache_tables import PARTS, Document, find, v3_against_v2, workloads


def draw(document: Document, folder: Path, stem: str) -> list[str]:
    """The files' names; the same measurements give the same files, byte for byte."""
    import matplotlib  # type: ignore[import-not-found, import-untyped, unused-ignore]

    matplotlib.rcParams["svg.hashsalt"] = "dilated"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"{stem}-ratio.svg": _ratios(document), f"{stem}-split.svg": _splits(document)}
    for name, figure in drawn.items():
        figure.savefig(folder / name, metadata={"Date": None})
    return list(drawn)


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    return figure, figure.subplots()


def _ratios(document: Document) -> Any:
    """Every round's ratio as a dot, the median and its interval beside."""
    figure, axes = _figure(3.2)
    compared = v3_against_v2(document)
    for place, (name, c) in enumerate(compared.items()):
        v2, v3 = (find(document, name, cache) for cache in ("v2", "v3"))
        assert v2 is not None and v3 is not None
        rounds = [index for index in v2["samples_ms"] if index in v3["samples_ms"]]
        ratios = [v3["samples_ms"][index] / v2["samples_ms"][index] for index in rounds]
        axes.plot([place] * len(ratios), ratios, ".", color="0.7", zorder=1)
        errors = [[c.ratio - c.low], [c.high - c.ratio]]
        axes.errorbar(place, c.ratio, yerr=errors, fmt="o", color="C0", capsize=6, zorder=2)
    axes.axhline(1.0, color="k", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(compared)), list(compared))
    axes.set_ylabel("V3 / V2, time of a step")
    axes.grid(alpha=0.3, axis="y")
    return figure


def _splits(document: Document) -> Any:
    """Bars of the parts for each workload and cache, in shares of V2's step."""
    figure, axes = _figure(4.2)
    labels, place = [], 0.0
    for name in workloads(document):
        base = find(document, name, "v2")
        for cache in ("none", "v2", "v3"):
            row = find(document, name, cache)
            if row is None or base is None:
                continue
            left = 0.0
            for number, part in enumerate(PARTS):
                share = row[f"{part}_ms"] / base["ms"]
                axes.barh(place, share, left=left, color=f"C{number}", label=part)
                left += share
            axes.plot(row["ms"] / base["ms"], place, "k|", markersize=10)
            labels.append((place, f"{name}, {cache}"))
            place -= 1
        place -= 0.5
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set_xlabel("host's and GPU's time as a share of V2's step; the mark is the step")
    handles, names = axes.get_legend_handles_labels()
    first = dict(zip(reversed(names), reversed(handles), strict=True))
    axes.legend([first[part] for part in PARTS if part in first], PARTS, frameon=False, fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    return figure
