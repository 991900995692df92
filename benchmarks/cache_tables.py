"""The tables of the caches that report.py puts into docs/caches.md, as Markdown."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from dilated_attention_pytorch import PatternCache

from .cache_steps import CACHES, OPTIONS, PARTS
from .results import Document, Row
from .tables import NOTHING, table
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
    """other / base: the median of the pairs' ratios, its 95 % bootstrap interval, and p.

    p is the probability, were the two alike, of mean log-ratios as far from 0: by flipping signs.
    """

    ratio: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def is_significant(self) -> bool:
        return self.p < LEVEL and not self.low <= 1.0 <= self.high

    @property
    def matters(self) -> bool:
        return self.is_significant and abs(self.ratio - 1) >= MATTERS

    def cells(self) -> tuple[str, str]:
        """The ratio with its interval, and p."""
        interval = f"{self.ratio:.3f} ({self.low:.3f}, {self.high:.3f})"
        return interval, "< 0.001" if self.p < 0.001 else f"{self.p:.3f}"

    def verdict(self, name: str) -> str:
        if not self.matters:
            return "no difference that matters"
        percent = abs(self.ratio - 1) * 100
        return f"{name} is {percent:.1f} % {'slower' if self.ratio > 1 else 'faster'}"


def compare(base: Sequence[float], other: Sequence[float], seed: int = 0) -> Comparison:
    """Of measurements made in turn: base[i] and other[i] belong together.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    if len(base) != len(other) or not base:
        raise ValueError(f"base and other must be pairs, got {len(base)} and {len(other)}")
    rng = random.Random(seed)
    ratios = [b / a for a, b in zip(base, other, strict=True)]
    medians = [median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    logs = [math.log(ratio) for ratio in ratios]
    seen = abs(fmean(logs))
    as_far = sum(
        abs(fmean(x if rng.random() < 0.5 else -x for x in logs)) >= seen for _ in range(RESAMPLES)
    )
    low, high = (percentile(medians, percent) for percent in (2.5, 97.5))
    return Comparison(median(ratios), low, high, (as_far + 1) / (RESAMPLES + 1), len(ratios))


def find(document: Document, workload: str, cache: str) -> Row | None:
    for row in document["rows"]:
        if (row["workload"], row["cache"]) == (workload, cache):
            return dict(row)
    return None


def workloads(document: Document) -> list[str]:
    return list(dict.fromkeys(row["workload"] for row in document["rows"]))


def compare_rows(base: Row | None, other: Row | None) -> Comparison | None:
    """By the rounds that both were measured in."""
    left, right = (row["samples_ms"] if row else {} for row in (base, other))
    rounds = [index for index in left if index in right]
    if not rounds:
        return None
    return compare([left[index] for index in rounds], [right[index] for index in rounds])


def caches_sections(document: Document | None) -> dict[str, str]:
    """Of one run: section, text."""
    if document is None:
        nothing = NOTHING.format(up="../")
        return {f"caches-{name}": nothing for name in _SECTIONS}
    return {f"caches-{name}": make(document) for name, make in _SECTIONS.items()}


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
    shown = [c for c in CACHES if any(row["cache"] == c for row in document["rows"])]
    head = ["workload", *(f"{_TITLES[cache]}, ms" for cache in shown)]
    rows = []
    for name in workloads(document):
        found = {cache: find(document, name, cache) for cache in shown}
        times = [
            f"{row['ms']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})" if row else "-"
            for row in found.values()
        ]
        c = compare_rows(found.get("v2"), found.get("v3"))
        said = [*c.cells(), str(c.pairs), c.verdict("V3")] if c else ["-"] * 4
        rows.append([name, *times, *said])
    return table([*head, "V3 / V2 (95 %)", "p", "rounds", "so"], rows)


def _parts(document: Document) -> str:
    head = ["workload", "cache", "step, ms", *(f"{part}, ms" for part in PARTS), "hit rate"]
    rows = [
        [row["workload"], row["cache"], f"{row['ms']:.4g}"]
        + [f"{row[f'{part}_ms']:.4g}" for part in PARTS]
        + [f"{row['hit_rate']:.3f}"]
        for row in document["rows"]
    ]
    return f"{table(head, rows)}\n\n{_prefetches(document)}"


def _prefetches(document: Document) -> str:
    """What V3 copied ahead on the workload whose lengths change, in a sentence."""
    row = find(document, "slides", "v3")
    if row is None:
        return "`slides` was not measured."
    counts = row["statistics"]
    return (
        f"On `slides` V3 made {counts['prefetches']} copies ahead, of which "
        f"{counts['prefetch_hits']} were used and {counts['wasted_prefetches']} dropped unused; "
        f"{counts['hot_hits']} of its {counts['hits'] + counts['misses']} look-ups found their "
        f"words on the GPU, {counts['misses']} planned or waited for a plan."
    )


def _memory(document: Document) -> str:
    head = ["workload", "V2 host, MiB", "V2 GPU, MiB", "V3 host (cold), MiB", "V3 GPU (hot), MiB"]
    rows = []
    for name in workloads(document):
        both = [find(document, name, cache) for cache in ("v2", "v3")]
        fields = ("host_mib", "gpu_mib")
        rows.append([name, *(f"{row[f]:.3g}" if row else "-" for row in both for f in fields)])
    return table(head, rows)


def _hits(document: Document) -> str:
    lines = []
    for hit in document["hits"]:
        target, name = HIT_TARGETS_US[hit["cache"]], hit["cache"].upper()
        kept = "within" if hit["us"] <= target else "beyond"
        what = "a hit" if name == "V2" else "a hot hit" if hit["hot"] else "a hit (not hot)"
        lines.append(
            f"* {name}: {what} costs {hit['us']:.2f} us of the host's time, the key's making "
            f"included; {kept} the aim of {target:g} us."
        )
    for cache in ("v2", "v3"):
        row = find(document, OVERHEAD_WORKLOAD, cache)
        if row is not None:
            share = (row["management_ms"] + row["transfer_ms"]) / row["kernel_ms"]
            kept = "within" if share <= OVERHEAD_TARGET else "beyond"
            lines.append(
                f"* {cache.upper()} on `{OVERHEAD_WORKLOAD}`: management and transfers take "
                f"{share:.3%} of the kernels' time; {kept} the aim of {OVERHEAD_TARGET:.0%}."
            )
    return "\n".join(lines)


def _options(document: Document) -> str:
    head = ["option", "where", "off, ms", "on, ms", "on / off (95 %)", "p", "gain", "default"]
    rows = []
    for option in document["options"]:
        c = compare(option["off_ms"], option["on_ms"])
        is_gain = c.matters and c.ratio < 1
        off, on = (sorted(option[key])[len(option[key]) // 2] for key in ("off_ms", "on_ms"))
        rows.append(
            [option["option"], option["where"], f"{off:.4g}", f"{on:.4g}", *c.cells()]
            + ["yes" if is_gain else "no", _default(option, is_gain)]
        )
    return table(head, rows)


def _default(option: Row, is_gain: bool) -> str:
    """What PatternCache does by itself, and whether the data agree."""
    name = OPTIONS.get(option["option"])
    if name is None:  # measured before it was left out
        return "not offered" + (", against these data" if is_gain else "")
    default = inspect.signature(PatternCache).parameters[name].default
    said = f"{'on' if default else 'off'} (`{name}={default}`)"
    return said if default == is_gain else f"{said}, against these data"


_SECTIONS = {
    "run": _run,
    "times": _times,
    "parts": _parts,
    "hits": _hits,
    "memory": _memory,
    "options": _options,
}
