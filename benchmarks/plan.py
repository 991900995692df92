"""Planning patterns: its time, their size, and what a plan saves.

    python -m benchmarks.bench plan

`nominal`, `distinct` and `computed` are pairs of a query and a key over all heads: every branch on
its own, each pair once, and with the tiles' empty corners.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dilated_attention_pytorch.pattern import Pattern, PatternSpec, Sequences, make_branches

from .results import Document, Row, Run
from .tables import Line, ratios, table
from .timing import Timing
from .workloads import WORKLOADS, Workload, slide_lengths

ON_CPU = "all there is: planning runs on the host, on one core but for the lengths of a batch."
BUDGET_SECONDS = 60.0
_MIN_CALLS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pattern")


def plan_workloads() -> Iterator[Workload]:
    """LongNet's branches on 16 heads at 128K and at 1M positions, and GigaPath's, by both rules."""
    longnet = replace(WORKLOADS["longnet-128k"], heads=16)
    for base in (
        replace(longnet, name="plan-128k"),
        replace(longnet, name="plan-1m", seq_len=1048576),
        replace(WORKLOADS["gigapath-10k"], causal=(False, True)),
        replace(WORKLOADS["gigapath-65k"], causal=(False, True)),
    ):
        for rule in ("blocked", "interleaved"):
            yield replace(base, name=f"{base.name}-{rule}", head_offsets=rule)


def plan_batches() -> Iterator[tuple[str, PatternSpec]]:
    """32 slides with GigaPath's branches, all of other lengths, and 64 documents of one length."""
    slides = [length for length in slide_lengths(64) if length <= 20_000][:32]
    yield "batch-32-slides", _packed(WORKLOADS["gigapath-10k"].spec(False), slides)
    documents = PatternSpec(
        0, make_branches([256, 512, 1024], [1, 2, 4]), "interleaved", 12, 12, is_causal=True
    )
    yield "batch-64-documents", _packed(documents, [2048] * 64)


def _packed(spec: PatternSpec, lengths: Sequence[int]) -> PatternSpec:
    places = [(sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    return spec._replace(seq_len=sum(lengths), sequences=Sequences(places))


def measure(run: Run, options: argparse.Namespace) -> None:
    """From a specification to its words, and their counts; batches also from known lengths."""
    for workload, causal in run.each(plan_workloads()):
        spec = workload.spec(causal)
        _add_row(run, options, workload.name, spec, partial(Pattern.plan, spec))
    for name, spec in plan_batches():
        parts = [Pattern.plan(part) for part in spec.parts()]
        _add_row(run, options, f"{name}, new lengths", spec, partial(Pattern.plan, spec))
        _add_row(run, options, f"{name}, known lengths", spec, partial(Pattern.join, spec, parts))


def _add_row(
    run: Run, options: argparse.Namespace, name: str, spec: PatternSpec, plan: Callable[[], Pattern]
) -> None:
    report = plan().report()
    times: list[float] = []
    while len(times) < _MIN_CALLS or sum(times) < options.seconds * 1e3:
        times.append(run.stopwatch.ms(plan))
    row: Row = {"workload": name, "seq_len": spec.seq_len, "heads": spec.heads}
    row |= {"causal": spec.is_causal, **Timing(times).columns}
    run.rows.append({**row, "calls": len(times), **report})
    run.say(f"{name}{', causal' if spec.is_causal else ''}: {row['ms']:.3g} ms")


def _line(row: Row) -> Line:
    return {
        "pattern": row["workload"],
        "causal": "yes" if row["causal"] else "no",
        "time": f"{row['ms']:.3g} ms",
        "size": f"{row['bytes'] / 1024:.0f} KiB",
        "tiles": str(row["tiles"]),
        **ratios(row),
    }


def planning_section(documents: Sequence[Document]) -> str:
    """The newest run of `bench plan`."""
    document = documents[-1]
    threads = document.get("threads") or 1
    lengths = f"; the lengths of a batch on {threads}" if threads > 1 else ""
    source = f"* {document['device']}, one core{lengths}; commit {document['commit'][:12]}, "
    return f"{table(map(_line, document['rows']))}\n\n{source}{document['date'][:10]}."
