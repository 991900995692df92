"""What the report on the caches says, as Markdown: tables, and sentences chosen by rules."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from dilated_attention_pytorch import PatternCache

from .significance import LEVEL, Comparison, compare

Document = dict[str, Any]
Row = dict[str, Any]

MATTERS = 0.01  # a smaller difference is called none, however sure it is
HIT_TARGETS_US = {"v2": 3.0, "v3": 5.0}
OVERHEAD_TARGET = 0.01
OVERHEAD_WORKLOAD = "longnet-128k"
# The table that was reported earlier: milliseconds of V2 and of V3.
EARLIER = {"seed-1024": (4.3, 3.9), "seed-4096": (7.4, 6.8), "seed-16384": (361.6, 218.5)}
PARTS = ("planning", "transfer", "waiting", "management", "kernel")


def find(document: Document, workload: str, cache: str) -> Row | None:
    for row in document["rows"]:
        if (row["workload"], row["cache"]) == (workload, cache):
            return dict(row)
    return None


def workloads(document: Document) -> list[str]:
    return list(dict.fromkeys(row["workload"] for row in document["rows"]))


def compare_rows(base: Row, other: Row) -> Comparison | None:
    """By the rounds that both were measured in."""
    left, right = base["samples_ms"], other["samples_ms"]
    rounds = [index for index in left if index in right]
    if not rounds:
        return None
    return compare([left[index] for index in rounds], [right[index] for index in rounds])


def v3_against_v2(document: Document) -> dict[str, Comparison]:
    found = {}
    for workload in workloads(document):
        v2, v3 = find(document, workload, "v2"), find(document, workload, "v3")
        if v2 is not None and v3 is not None and (result := compare_rows(v2, v3)) is not None:
            found[workload] = result
    return found


def matters(comparison: Comparison) -> bool:
    return comparison.is_significant and abs(comparison.ratio - 1) >= MATTERS


def verdict(comparison: Comparison, name: str) -> str:
    if not matters(comparison):
        return "no difference that matters"
    percent = abs(comparison.ratio - 1) * 100
    return f"{name} is {percent:.1f} % {'slower' if comparison.ratio > 1 else 'faster'}"


def summary(document: Document) -> str:
    """The outcome in sentences, whichever way the data fall."""
    compared = v3_against_v2(document)
    worse = [name for name, c in compared.items() if matters(c) and c.ratio > 1]
    better = [name for name, c in compared.items() if matters(c) and c.ratio < 1]
    alike = [name for name in compared if name not in (*worse, *better)]
    lines = []
    if worse:
        lines.append(f"V3 is slower than V2 on {_listed(worse)}.")
    if better:
        lines.append(f"V3 is faster than V2 on {_listed(better)}.")
    if alike:
        lines.append(f"On {_listed(alike)} they do not differ by anything that matters.")
    if better:
        lines.append(
            f"So these data do not support deprecating V3 for what {_listed(better)} stand"
            f"{'s' if len(better) == 1 else ''} for."
        )
    elif worse:
        lines.append("So these data support deprecating V3: it costs time and gains none.")
    else:
        lines.append(
            "So these data support deprecating V3 for its complexity, which gains nothing, and not "
            "for its speed."
        )
    return " ".join(lines)


def _listed(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"`{names[0]}`"
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" and `{names[-1]}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(c: Comparison) -> str:
    return f"{c.ratio:.3f} ({c.low:.3f}, {c.high:.3f})"


def _p(c: Comparison) -> str:
    return "< 0.001" if c.p < 0.001 else f"{c.p:.3f}"


def _time(row: Row | None) -> str:
    return "-" if row is None else f"{row['ms']:.4g} ({row['ms_p10']:.4g}, {row['ms_p90']:.4g})"


def times(document: Document) -> str:
    compared = v3_against_v2(document)
    head = ["workload", "none, ms", "V2, ms", "V3, ms", "V3 / V2 (95 %)", "p", "rounds", "so"]
    rows = []
    for name in workloads(document):
        c = compared.get(name)
        said = ["-"] * 4 if c is None else [_interval(c), _p(c), str(c.pairs), verdict(c, "V3")]
        rows.append(
            [name, *(_time(find(document, name, cache)) for cache in ("none", "v2", "v3")), *said]
        )
    return table(head, rows)


def earlier(document: Document) -> str:
    head = ["workload", "earlier V2, ms", "earlier V3, ms", "V3 / V2", "here V2, ms", "here V3, ms"]
    rows = []
    for name, (v2, v3) in EARLIER.items():
        here = [find(document, name, cache) for cache in ("v2", "v3")]
        c = v3_against_v2(document).get(name)
        rows.append(
            [name, f"{v2}", f"{v3}", f"{v3 / v2:.2f}"]
            + ["-" if row is None else f"{row['ms']:.4g}" for row in here]
            + ["-" if c is None else _interval(c)]
        )
    return table([*head, "V3 / V2 (95 %)"], rows)


def parts(document: Document) -> str:
    head = ["workload", "cache", "step, ms", *(f"{part}, ms" for part in PARTS), "hit rate"]
    return table(
        head,
        (
            [row["workload"], row["cache"], f"{row['ms']:.4g}"]
            + [f"{row[f'{part}_ms']:.4g}" for part in PARTS]
            + [f"{row['hit_rate']:.3f}"]
            for row in document["rows"]
        ),
    )


def memory(document: Document) -> str:
    head = ["workload", "V2 host, MiB", "V2 GPU, MiB", "V3 host (cold), MiB", "V3 GPU (hot), MiB"]
    rows = []
    for name in workloads(document):
        both = [find(document, name, cache) for cache in ("v2", "v3")]
        fields = ("host_mib", "gpu_mib")
        cells = ["-" if row is None else f"{row[f]:.3g}" for row in both for f in fields]
        rows.append([name, *cells])
    return table(head, rows)


def prefetches(document: Document) -> str:
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


def overheads(document: Document) -> str:
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


def options(document: Document) -> str:
    head = ["option", "where", "off, ms", "on, ms", "on / off (95 %)", "p", "gain", "default"]
    rows = []
    for option in document["options"]:
        c = compare(option["off_ms"], option["on_ms"])
        is_gain = matters(c) and c.ratio < 1
        off, on = (sorted(option[key])[len(option[key]) // 2] for key in ("off_ms", "on_ms"))
        rows.append(
            [option["option"], option["where"], f"{off:.4g}", f"{on:.4g}", _interval(c), _p(c)]
            + ["yes" if is_gain else "no", _default(option, is_gain)]
        )
    return table(head, rows)


def _default(option: Row, is_gain: bool) -> str:
    """What PatternCache does by itself, and whether the data agree."""
    name = {"batched transfer": "batch_transfers", "asynchronous transfer": "async_transfers"}.get(
        option["option"]
    )
    if name is None:  # measured before it was left out
        return "not offered" + (", against these data" if is_gain else "")
    default = inspect.signature(PatternCache).parameters[name].default
    said = f"{'on' if default else 'off'} (`{name}={default}`)"
    return said if default == is_gain else f"{said}, against these data"


def level_text() -> str:
    return (
        f"A difference is called one where p < {LEVEL}, the interval does not hold 1 and it is at "
        f"least {MATTERS:.0%}."
    )
