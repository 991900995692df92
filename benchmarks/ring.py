"""Attention over a sequence that is sharded over ranks: our strategies, and their peers.

    torchrun --nproc-per-node 2 -m benchmarks.bench ring
    torchrun --nproc-per-node 2 -m benchmarks.bench ring --workloads llm-256k-whole --trace trace

On GPUs over NCCL, else over gloo. Peers take turns; a launch's time is that of its slowest rank.
exposed_comm_ms is what a launch takes beyond the same launch with nothing exchanged. bytes_per_rank
is what the busiest rank sends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dilated_attention_pytorch.ring.group.communicator import Communicator

from .peers.calls import Calls, Inputs, reason
from .peers.ring import NAMES, SINGLE, STRATEGIES, Case, prepare, without_exchange
from .plots import DRAWN
from .results import Document, Row, Run, names
from .tables import Line, commit_line, mib, number, table
from .timing import Launch, Stopwatch, Timing, peak_mib
from .workloads import BOTH, WORKLOADS, Pass

ON_CPU = "what travels is that of GPUs; the times are those of gloo and of the CPU kernels."
BUDGET_SECONDS = 600.0
_DEFAULT = ("llm-128k", "llm-256k-whole", "longnet-128k", "llm-128k-gqa")
TURNS = 3


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", type=names(WORKLOADS), default=list(_DEFAULT))
    parser.add_argument("--strategies", type=names(NAMES), default=list(NAMES))
    parser.add_argument("--seq-len", type=int, help="of every workload, to try things out")
    parser.add_argument("--repeats", type=int, default=21, help=f"of each, in {TURNS} turns")
    parser.add_argument("--settle-seconds", type=float, default=0.25, help="of each turn, untimed")
    parser.add_argument("--trace", type=Path, help="a folder for one profiler trace a rank")


def connect(device: torch.device) -> dist.ProcessGroup:
    """The group that torchrun started this process in."""
    if device.type == "cuda":
        # At usual priority, an exchange that is posted first may begin last: its kernel finds no
        # room on the multiprocessors until the attention's last blocks leave.
        nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        dist.init_process_group("nccl", device_id=device, pg_options=nccl)
    else:
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class Bench:
    """Launches on all ranks at once; times are the slowest rank's."""

    def __init__(
        self, group: dist.ProcessGroup, stopwatch: Stopwatch, options: argparse.Namespace
    ) -> None:
        self.group, self._stopwatch = group, stopwatch
        self._launches, self._settle_seconds = -(-options.repeats // TURNS), options.settle_seconds
        counts = {"turns": TURNS, "launches_a_turn": self._launches}
        self.protocol = {**counts, "settle_seconds": self._settle_seconds}

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's largest over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._stopwatch.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return [float(value) for value in tensor]

    def rows(self, peers: Mapping[str, Calls], pass_: Pass) -> Iterator[Row]:
        """The measured columns of each peer, in their order.

        The peers take turns, so that all meet the same clocks; each of our strategies is timed once
        more with nothing exchanged.
        """
        launches = {name: launch for name, c in peers.items() if (launch := c.get(pass_))}
        facts = [self._facts(name, launches[name], peers[name].sent) for name in peers]
        times: dict[str, list[float]] = {name: [] for name in peers}
        alone: dict[str, list[float]] = {name: [] for name in peers if name in STRATEGIES}
        for _ in range(TURNS):
            for name, launch in launches.items():
                times[name] += self._turn(launch)
                if name in alone:
                    with without_exchange():
                        alone[name] += self._turn(launch)
        for name, fact in zip(peers, facts, strict=True):
            timing = Timing(self.largest(times[name]))
            exposed = timing.ms - Timing(self.largest(alone[name])).ms if name in alone else None
            yield {**timing.columns, "exposed_comm_ms": exposed, **fact}

    def _facts(self, name: str, launch: Launch, sent: Callable[[], int]) -> Row:
        """What does not vary."""
        launch()
        before = sent()
        launch()
        bytes_sent = sent() - before
        peak = peak_mib(launch, self._stopwatch)
        most_sent, most_memory = self.largest([bytes_sent, peak or 0.0])
        is_sent = name in STRATEGIES and most_sent > 0
        return {
            "bytes_per_rank": int(most_sent),
            "peak_mib": None if peak is None else most_memory,
            "transport": Communicator(self.group.group_name).transport if is_sent else None,
        }

    def _turn(self, launch: Launch) -> list[float]:
        """Milliseconds on this rank, after launches until the clock has settled under this load."""
        begin, elapsed = time.monotonic(), 0.0
        while elapsed <= self._settle_seconds:
            self._time(launch)
            (elapsed,) = self.largest([time.monotonic() - begin])
        return [self._time(launch) for _ in range(self._launches)]

    def _time(self, launch: Launch) -> float:
        self.largest([0.0])  # all ranks begin together
        self._stopwatch.synchronize()
        return self._stopwatch.ms(launch)


def trace(launch: Launch, stopwatch: Stopwatch, path: Path) -> None:
    """A launch under the profiler, which `bench timeline` draws.

    One before it is in the trace too: ranks begin that one apart, as profilers take their time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        stopwatch.wall_ms(launch)
        with torch.profiler.record_function(DRAWN):
            stopwatch.wall_ms(launch)
    profiler.export_chrome_trace(str(path))


def measure(run: Run, options: argparse.Namespace) -> None:
    group = connect(run.device)
    try:
        bench = Bench(group, run.stopwatch, options)
        run.document |= {"world_size": group.size(), "protocol": bench.protocol}
        wanted = [WORKLOADS[name] for name in options.workloads]
        if options.seq_len:
            wanted = [replace(workload, seq_len=options.seq_len) for workload in wanted]
        are_late = lambda: bench.largest([run.is_late()]) > [0.0]  # noqa: E731 - all, or none
        for workload, causal in run.each(wanted, are_late):
            inputs = Inputs.make(workload, run.device)
            _measure_case(run, options, bench, Case(workload, causal, inputs, bench.group))
    finally:
        dist.destroy_process_group()


def _measure_case(run: Run, options: argparse.Namespace, bench: Bench, case: Case) -> None:
    what = {"workload": case.workload.name, "causal": case.is_causal}
    peers: dict[str, Calls] = {}
    for name in options.strategies:
        try:
            calls = prepare(name, case)
            for launch in filter(None, map(calls.get, BOTH)):
                launch()
            peers[name] = calls
        except Exception as error:  # a peer that fails, fails on all ranks: the others go on
            run.skip(reason(error), **what, strategy=name)
    for pass_ in BOTH:
        times = []
        for name, row in zip(peers, bench.rows(peers, pass_), strict=True):
            ranks = 1 if name == SINGLE else bench.group.size()
            run.rows.append({**what, "strategy": name, "world_size": ranks, "pass": pass_, **row})
            times.append(f"{name} {row['ms']:.4g}")
        run.say(f"{case.workload.title(case.is_causal)}: {', '.join(times)} ms ({pass_})")
    for name, calls in peers.items() if options.trace else ():
        file = f"{case.workload.name}-{name}-{'causal' if case.is_causal else 'full'}"
        path = options.trace / f"{file}-rank{bench.group.rank()}.json"
        trace(calls.both or calls.forward, run.stopwatch, path)


_LEGEND = (
    "Milliseconds of the slowest rank. *of one GPU*: how many times as fast as one GPU with the "
    "whole sequence, on the same commit, device and day; a line is from the newest that has it. "
    "*exposed*: what the exchange adds to the time, forward / forward and backward. *sent*: by the "
    "busiest rank, likewise. Memory is of a forward and backward, beyond the inputs. "
    "torch-context-parallel computes full attention. -: not measured, or nothing to measure."
)
Peer = tuple[str, bool, str, bool]  # workload, causal, strategy, whether by copy engines


def _peer(row: Row) -> Peer:
    by_engine = row.get("transport") == "copy engine"
    return row["workload"], row["causal"], row["strategy"], by_engine


def _exposed(row: Row) -> str:
    """Per cent of the launch: a difference of two times, so noise may make it negative."""
    if row.get("exposed_comm_ms") is None:
        return "-"
    return f"{round(100 * row['exposed_comm_ms'] / row['ms'], 1) + 0.0:.1f}"


def _sent(row: Row) -> str:
    return number(row, "bytes_per_rank", ".0f", 2**-20)


def ring_section(documents: Sequence[Document]) -> str:
    """For each kind of device, every peer's newest run."""
    devices = dict.fromkeys(document["device"] for document in documents)
    parts = [_table([d for d in documents if d["device"] == device]) for device in devices]
    return "\n\n".join([*parts, _LEGEND])


def _line(peer: Peer, rows: Sequence[Row]) -> Line:
    workload, causal, strategy, by_engine = peer
    found = {(_peer(row), row["pass"]): row for row in rows}
    line = {
        "workload": WORKLOADS[workload].title(causal),
        "strategy": f"{strategy}{', copy engine' if by_engine else ''}",
    }
    passes = [found.get((peer, pass_), {}) for pass_ in BOTH]
    line["ranks"] = str((passes[0] or passes[1])["world_size"])
    for pass_, row in zip(BOTH, passes, strict=True):
        alone = found.get(((workload, causal, SINGLE, False), pass_), {})
        is_ring = bool(row and alone) and strategy != SINGLE
        line[f"{pass_}, ms"] = number(row, form=".4g")
        speedup = f"{alone['ms'] / row['ms']:.2f}" if is_ring else "-"
        line[f"of one GPU{'' if pass_ == 'fwd' else ' '}"] = speedup  # titles differ in spaces
    line["exposed, %"] = " / ".join(map(_exposed, passes))
    line["sent, MiB"] = " / ".join(map(_sent, passes))
    return line | {"peak MiB": mib(passes[1])}


def _table(documents: Sequence[Document]) -> str:
    """Of one device, oldest first."""
    newest = {_peer(row): document for document in documents for row in document["rows"]}
    cases = [_peer(row)[:2] for document in documents[::-1] for row in document["rows"]]
    peers = sorted(newest, key=lambda p: (cases.index(p[:2]), NAMES.index(p[2]), p[3]))
    lines = [_line(peer, newest[peer]["rows"]) for peer in peers]
    sources = [_source(document) for document in documents if document in newest.values()]
    return "\n".join([table(lines), "", *sources])


def _source(document: Document) -> str:
    protocol = document["protocol"]
    return (
        f"* {document['device']}, driver {document['driver']}; torch "
        f"{document['versions']['torch']}. {commit_line(document)[:-1]}; {protocol['turns']} turns "
        f"of {protocol['launches_a_turn']} launches, each after {protocol['settle_seconds']} s."
    )
