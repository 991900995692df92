"""The documents' pictures. The same measurements give the same files, byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .cache_tables import by_workload, compare_caches, kernel_ms
from .caches import PARTS
from .peers import IMPLS
from .readme_tables import PEERS, Case
from .results import Document
from .tables import Figures, shape
from .workloads import Workload, floors

Measured = Sequence[tuple[Workload, Document]]
Points = dict[str, list[tuple[int, float]]]
Interval = tuple[float, float]  # begin, end; microseconds

_FLOOR = "floor"
_TITLE = 10  # points
EXCHANGE, COMPUTE = "exchange", "compute"
DRAWN = "drawn"  # the annotation of the launch that is drawn; nothing comes after it
_EXCHANGE_NAMES = ("nccl", "memcpy peer", "memcpy ptop")


def _axes(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure and what `subplots` makes in it."""
    import matplotlib  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "dilated"
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**options)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_speed(case: Case, path: Path) -> None:
    """Bars of milliseconds, forward beside forward and backward: this library and its peers."""
    figure, both = _axes(8.0, 2.4, ncols=2, sharey=True)
    what = re.sub(r"\b\d{4,}\b", lambda size: f"{int(size[0]):,}", shape(case.workload))
    figure.suptitle(f"LongNet's branches, {what}, {case.document['device']}", fontsize=_TITLE)
    names = {"ours": "this library", "sdpa-views": PEERS["sdpa-views"], **PEERS}
    panels = (("fwd", "forward"), ("fwd+bwd", "forward and backward"))
    for axes, (pass_, title) in zip(both, panels, strict=True):
        for place, impl in enumerate(names):
            row = case.row(impl, pass_)
            ms = row.get("ms", 0.0)
            axes.barh(place, ms, color="tab:blue" if impl == "ours" else "0.75")
            text = f"{ms:.3g}" if row else "not measured"
            axes.annotate(text, (ms, place), (4, 0), textcoords="offset points", va="center")
        axes.margins(x=0.2)
        axes.set_yticks(range(len(names)), list(names.values()))
        axes.set_xlabel(f"milliseconds, {title}")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()  # shared
    _save(figure, path)


def points(measured: Measured, field: str) -> Points:
    """Per implementation, (seq_len, value) of the forward under sustained load, by length."""
    found: Points = {name: [] for name in (*IMPLS, _FLOOR)}
    for workload, document in sorted(measured, key=lambda each: each[0].seq_len):
        for impl in IMPLS:
            value = Figures(document, workload, False).row(impl, "fwd").get(field)
            if value is not None:
                found[impl].append((workload.seq_len, float(value)))
        if field == "ms":
            least = max(floors(workload, False, "fwd", document["ceilings"]))
            found[_FLOOR].append((workload.seq_len, least))
    return {name: values for name, values in found.items() if values}


def _lengths_title(measured: Measured) -> str:
    """The shape, the device of most lengths, and which were measured on another."""
    (workload, _), *_ = measured
    what = re.sub(rf"\b{workload.seq_len}\b", "N", shape(workload))
    lengths: dict[str, list[str]] = {}
    for each, document in measured:
        lengths.setdefault(document["device"], []).append(f"{each.seq_len // 1024}K")
    device, *others = sorted(lengths, key=lambda name: -len(lengths[name]))
    elsewhere = [f"; {', '.join(lengths[name])}: {name}" for name in others]
    return f"LongNet's branches, {what}\n{device}{''.join(elsewhere)}"


def draw_lengths(measured: Measured, folder: Path) -> None:
    """time.svg and memory.svg, from the "scale-N" workloads."""
    title = _lengths_title(measured)
    for field, label, name in (
        ("ms", "milliseconds, forward", "time"),
        ("peak_mib", "MiB beyond the inputs, forward", "memory"),
    ):
        figure, axes = _axes(6.4, 4.2)
        series = points(measured, field)
        for impl, values in series.items():
            style = "k--" if impl == _FLOOR else "o-"
            width = 2.5 if impl == "ours" else 1.2
            places = zip(*values, strict=True)
            axes.loglog(*places, style, label=impl, linewidth=width, markersize=4)
        lengths = sorted({length for values in series.values() for length, _ in values})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
        axes.set_title(title, fontsize=_TITLE)
        axes.set_xlabel("positions, N")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        _save(figure, folder / f"{name}.svg")


def _cache_title(document: Document) -> str:
    return f"Caches of patterns on {document['device']}, workload by workload"


def draw_ratios(document: Document, path: Path) -> None:
    """V3's time over V2's: every round's ratio as a dot, the median and its interval beside."""
    figure, axes = _axes(6.4, 3.2)
    workloads = by_workload(document)
    for place, rows in enumerate(workloads.values()):
        c = compare_caches(rows)
        axes.plot([place] * len(c.ratios), c.ratios, ".", color="0.7", zorder=1)
        errors = [[c.ratio - c.low], [c.high - c.ratio]]
        axes.errorbar(place, c.ratio, yerr=errors, fmt="o", color="C0", capsize=6, zorder=2)
    axes.axhline(1.0, color="k", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_title(_cache_title(document), fontsize=_TITLE)
    axes.set_ylabel("V3 / V2, time of a step")
    axes.grid(alpha=0.3, axis="y")
    _save(figure, path)


def draw_splits(document: Document, path: Path) -> None:
    """Where a step's time goes: bars of its parts for each cache, in shares of V2's step."""
    figure, axes = _axes(6.4, 4.2)
    labels, place = list[tuple[float, str]](), 0.0
    for name, rows in by_workload(document).items():
        whole = rows["v2"]["ms"]
        for cache, row in rows.items():
            left = 0.0
            for number, part in enumerate(PARTS):
                share = (kernel_ms(rows) if part == "kernel" else row[f"{part}_ms"]) / whole
                label = "" if labels else part  # the legend's, once
                axes.barh(place, share, left=left, color=f"C{number}", label=label)
                left += share
            axes.plot(row["ms"] / whole, place, "k|", markersize=10)
            labels.append((place, f"{name}, {cache}"))
            place -= 1
        place -= 0.5
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=8)
    axes.set_title(_cache_title(document), fontsize=_TITLE)
    axes.set_xlabel("host's and GPU's time as a share of V2's step; the mark is the step")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3, axis="x")
    _save(figure, path)


def read_trace(trace: Mapping[str, Any]) -> dict[str, list[Interval]]:
    """What the GPU did, as exchange and compute."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    start = min(float(event["ts"]) for event in events if event["name"] == DRAWN)
    found: dict[str, list[Interval]] = {EXCHANGE: [], COMPUTE: []}
    for event in events:
        begin, name = float(event["ts"]), str(event["name"]).lower()
        if begin >= start and event.get("cat") in ("kernel", "gpu_memcpy"):
            is_exchange = any(part in name for part in _EXCHANGE_NAMES)
            interval = (begin, begin + float(event["dur"]))
            found[EXCHANGE if is_exchange else COMPUTE].append(interval)
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Joined where they touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def exposed(exchange: Sequence[Interval], compute: Sequence[Interval]) -> tuple[float, float]:
    """The time of the exchange in which nothing was computed: as a share of the exchange's time,
    and of the time from the first interval's begin to the last one's end.
    """
    every = [*exchange, *compute]
    exchanging, computing, either = (
        sum(end - begin for begin, end in union(some)) for some in (exchange, compute, every)
    )
    whole = max(end for _, end in every) - min(begin for begin, _ in every)
    return (either - computing) / exchanging, (either - computing) / whole


def draw_timeline(trace: Path, picture: Path) -> None:
    """When a rank computed and when it exchanged, from a profiler trace of a ring's launch.

    python -m benchmarks.bench timeline trace/llm-256k-whole-auto-full-rank0.json ring.svg
    """
    events = json.loads(trace.read_text())
    intervals = read_trace(events)
    device = next((each["name"] for each in events.get("deviceProperties", ())), "CPU")
    origin = min(begin for some in intervals.values() for begin, _ in some)
    figure, axes = _axes(8.0, 2.0)
    for row, (name, color) in enumerate(((EXCHANGE, "tab:orange"), (COMPUTE, "tab:blue"))):
        bars = [((b - origin) / 1e3, (e - b) / 1e3) for b, e in union(intervals[name])]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=color)
    of_exchange, of_whole = exposed(intervals[EXCHANGE], intervals[COMPUTE])
    axes.set_title(f"{trace.stem}, {device}", fontsize=_TITLE)
    axes.set_yticks([0, 1], [EXCHANGE, COMPUTE])
    axes.set_xlabel(
        f"milliseconds; exposed, with nothing computed meanwhile: {of_exchange:.0%} of the "
        f"exchange, {of_whole:.1%} of the time"
    )
    _save(figure, picture)
