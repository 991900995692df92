"""The tables of the caches that report.py puts into docs/caches.md, as Markdown."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, median

from .caches import CACHES, OPTIONS, PARTS
from .results import Document, Row, find
from .tables import Line, number, spread, table
from .timing import percentile

RESAMPLES = 4000
LEVEL = 0.01  # two-sided; and the interval must not hold 1
MATTERS = 0.01  # a smaller difference is called none, however sure it is
HIT_TARGETS_US = {"v2": 3.0, "v3": 5.0}
OVERHEAD_TARGET = 0.01
OVERHEAD_WORKLOAD = "longnet-128k"
_TITLES = {"none": "none", "v2": "V2", "v2-announced": "V2, announced", "v3": "V3"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """other / base, pair by pair; a 95 % bootstrap interval of their median, and p.

    p is the probability, were the two alike, of mean log-ratios as far from 0: by flipping signs.
    """

    ratios: list[float]
    low: float
    high: float
    p: float

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def matters(self) -> bool:
        is_sure = self.p < LEVEL and not self.low <= 1.0 <= self.high
        return is_sure and abs(self.ratio - 1) >= MATTERS

    def cells(self, title: str) -> Line:
        """The ratio with its interval, and p."""
        interval = f"{self.ratio:.3f} ({self.low:.3f}, {self.high:.3f})"
        return {title: interval, "p": "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"}

    def verdict(self, name: str) -> str:
        if not self.matters:
            return "no difference that matters"
        percent = abs(self.ratio - 1) * 100
        return f"{name} is {percent:.1f} % {'slower' if self.ratio > 1 else 'faster'}"


def compare(base: Iterable[float], other: Iterable[float]) -> Comparison:
    """Of measurements made in turn: those in one place belong together."""
    rng = random.Random(0)
    ratios = [b / a for a, b in zip(base, other, strict=True)]
    medians = [median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    logs = [math.log(ratio) for ratio in ratios]
    seen = abs(fmean(logs))
    as_far = sum(
        abs(fmean(x if rng.random() < 0.5 else -x for x in logs)) >= seen for _ in range(RESAMPLES)
    )
    low, high = (percentile(medians, percent) for percent in (2.5, 97.5))
    return Comparison(ratios, low, high, (as_far + 1) / (RESAMPLES + 1))


def compare_caches(rows: Mapping[str, Row]) -> Comparison:
    """V3 with V2, on one workload, of which these are the rows."""
    return compare(*(rows[cache]["samples_ms"].values() for cache in ("v2", "v3")))


def by_workload(document: Document) -> dict[str, dict[str, Row]]:
    """The rows of each workload, by cache."""
    found: dict[str, dict[str, Row]] = {}
    for row in document["rows"]:
        found.setdefault(row["workload"], {})[row["cache"]] = row
    return found


def kernel_ms(rows: Mapping[str, Row]) -> float:
    """The GPU's time for a workload's calls, which are the same whatever the cache.

    The least of its rows, which older runs measured one by one: where the host was slow, the GPU
    waited within what was timed.
    """
    return min(float(row["kernel_ms"]) for row in rows.values())


def _run(document: Document) -> str:
    """What was measured where, and what was left out."""
    source = document["file"]
    versions, protocol = document["versions"], document["protocol"]
    missing = [", ".join(f"{k} {v}" for k, v in skipped.items()) for skipped in document["skipped"]]
    return (
        f"{document['device']}, driver {document['driver']}, torch {versions['torch']}, Python "
        f"{versions['python']}, commit {document['commit'][:12]}, {document['date'][:10]}: "
        f"[{source}](../benchmarks/results/{source}). {protocol['rounds']} rounds, "
        f"{protocol['slides']} lengths. "
    ) + (f"Not measured: {'; '.join(missing)}." if missing else "Nothing was left out.")


def _times(document: Document) -> str:
    shown = [cache for cache in CACHES if find(document["rows"], cache=cache)]
    lines = []
    for name, rows in by_workload(document).items():
        times = {f"{_TITLES[cache]}, ms": spread(rows.get(cache, {})) for cache in shown}
        c = compare_caches(rows)
        said = {**c.cells("V3 / V2 (95 %)"), "rounds": str(len(c.ratios)), "so": c.verdict("V3")}
        lines.append({"workload": name, **times, **said})
    return table(lines)


def _parts(document: Document) -> str:
    """Where a step's time goes, and what V3 copied ahead where lengths change."""
    said = "`slides` was not measured."
    if row := find(document["rows"], workload="slides", cache="v3"):
        counts = row["statistics"]
        said = (
            f"On `slides` V3 made {counts['prefetches']} copies ahead, of which "
            f"{counts['prefetch_hits']} were used and {counts['wasted_prefetches']} dropped "
            f"unused; {counts['hot_hits']} of its {counts['hits'] + counts['misses']} look-ups "
            f"found their words on the GPU, {counts['misses']} planned or waited for a plan."
        )
    lines = [
        {"workload": name, "cache": cache, "step, ms": number(row, form=".4g")}
        | {f"{part}, ms": number(row, f"{part}_ms", ".4g") for part in PARTS}
        | {"kernel, ms": f"{kernel_ms(rows):.4g}", "hit rate": number(row, "hit_rate", ".3f")}
        for name, rows in by_workload(document).items()
        for cache, row in rows.items()
    ]
    return f"{table(lines)}\n\n{said}"


def _memory(document: Document) -> str:
    lines = []
    for name, rows in by_workload(document).items():
        lines.append({"workload": name})
        for cache, host, gpu in (("v2", "host", "GPU"), ("v3", "host (cold)", "GPU (hot)")):
            for title, key in ((host, "host_mib"), (gpu, "gpu_mib")):
                lines[-1][f"{cache.upper()} {title}, MiB"] = number(rows[cache], key)
    return table(lines)


def _aim(value: float, target: float) -> str:
    return f"{'within' if value <= target else 'beyond'} the aim of"


def _hits(document: Document) -> str:
    lines = []
    for hit in document["hits"]:
        target, name = HIT_TARGETS_US[hit["cache"]], hit["cache"].upper()
        what = "a hot hit" if name == "V3" else "a hit"
        lines.append(
            f"* {name}: {what} costs {hit['us']:.2f} us of the host's time, the key's making "
            f"included; {_aim(hit['us'], target)} {target:g} us."
        )
    rows = by_workload(document).get(OVERHEAD_WORKLOAD, {})
    for cache in HIT_TARGETS_US:
        if row := rows.get(cache):
            share = (row["management_ms"] + row["transfer_ms"]) / kernel_ms(rows)
            lines.append(
                f"* {cache.upper()} on `{OVERHEAD_WORKLOAD}`: management and transfers take "
                f"{share:.3%} of the kernels' time; {_aim(share, OVERHEAD_TARGET)} "
                f"{OVERHEAD_TARGET:.0%}."
            )
    return "\n".join(lines)


def _options(document: Document) -> str:
    lines = []
    for option in document["options"]:
        c = compare(option["off_ms"], option["on_ms"])
        line = {"option": option["option"], "where": option["where"]}
        for key in ("off", "on"):
            values = option[f"{key}_ms"]
            line[f"{key}, ms"] = f"{sorted(values)[len(values) // 2]:.4g}"
        line |= {**c.cells("on / off (95 %)"), "gain": "yes" if c.matters and c.ratio < 1 else "no"}
        name = OPTIONS.get(option["option"])  # else measured before it was left out
        lines.append({**line, "default": f"on (`{name}=True`)" if name else "not offered"})
    return table(lines)


CACHES_SECTIONS = {
    "caches-run": _run,
    "caches-times": _times,
    "caches-parts": _parts,
    "caches-hits": _hits,
    "caches-memory": _memory,
    "caches-options": _options,
}
