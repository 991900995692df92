"""Measures attention over a sequence that is sharded over ranks, and its peers.

    torchrun --nproc-per-node 2 -m benchmarks.bench_ring
    torchrun --nproc-per-node 2 -m benchmarks.bench_ring --workloads llm-256k-whole --trace trace

Writes benchmarks/results/ring-<device>-<date>.json. On GPUs over NCCL, else over gloo. Peers take
turns; a launch's time is that of its slowest rank. exposed_comm_ms is what a launch takes beyond
the same launch with nothing exchanged. bytes_per_rank is what the busiest rank sends.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dilated_attention_pytorch.ring.group.communicator import Communicator

from . import schema
from .calls import Inputs, reason
from .device_state import make_monitor
from .environment import RESULTS, describe, slug
from .ring_peers import NAMES, SINGLE, STRATEGIES, Case, Launches, make_launches, without_exchange
from .ring_timeline import DRAWN
from .timing import Stopwatch, Timing, peak_mib, summarize
from .workloads import WORKLOADS, Workload

_LLM = WORKLOADS["llm-128k"]
_LONG = replace(
    _LLM,
    name="llm-256k-whole",
    group="ring",
    seq_len=262144,
    segment_lengths=(2048, 8192, 32768, 131072, 262144),
)
RING_WORKLOADS = {
    w.name: w for w in (_LLM, _LONG, WORKLOADS["longnet-128k"], WORKLOADS["llm-128k-gqa"])
}
PASSES = {"fwd": "forward", "fwd+bwd": "both"}
TURNS = 3
COLUMNS = (
    *("workload", "causal", "strategy", "world_size", "pass", "ms", "ms_p10", "ms_p90"),
    *("exposed_comm_ms", "bytes_per_rank", "peak_mib", "transport"),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ring", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--workloads", type=names, default=list(RING_WORKLOADS))
    parser.add_argument("--strategies", type=names, default=list(NAMES))
    parser.add_argument("--seq-len", type=int, help="of every workload, to try things out")
    parser.add_argument("--repeats", type=int, default=21, help=f"of each, in {TURNS} turns")
    parser.add_argument("--settle-seconds", type=float, default=0.25, help="of each turn, untimed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write into")
    parser.add_argument("--tag", default="", help="appended to the file's name")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--trace", type=Path, help="a folder for one profiler trace a rank")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    known = {"workloads": {*RING_WORKLOADS, *WORKLOADS}, "strategies": set(NAMES)}
    for name, allowed in known.items():
        unknown = sorted(set(getattr(options, name)) - allowed)
        if unknown:
            parser.error(f"--{name} must be among {sorted(allowed)}, got {unknown}")
    return options


def connect(device_type: str) -> tuple[dist.ProcessGroup, torch.device]:
    """The group that torchrun started this process in."""
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # Otherwise an exchange that is posted first may yet begin last: its kernel finds no room
        # on the multiprocessors until the attention's last blocks leave.
        nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        dist.init_process_group("nccl", device_id=device, pg_options=nccl)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    assert dist.group.WORLD is not None
    return dist.group.WORLD, device


class Bench:
    """Launches on all ranks at once; times are the slowest rank's."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, repeats: int, settle_seconds: float
    ) -> None:
        self._group = group
        self._launches, self._settle_seconds = -(-repeats // TURNS), settle_seconds
        self._stopwatch = Stopwatch(device)

    @property
    def protocol(self) -> dict[str, float]:
        """How each peer is timed, for the results."""
        return {
            "turns": TURNS,
            "launches_a_turn": self._launches,
            "settle_seconds": self._settle_seconds,
        }

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's largest over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._stopwatch.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return [float(value) for value in tensor]

    def rows(self, peers: Mapping[str, Launches], pass_: str) -> Iterator[dict[str, Any]]:
        """The measured columns of each peer, in their order.

        The peers take turns, so that all meet the same clocks; each of our strategies is timed once
        more with nothing exchanged.
        """
        launches = {name: getattr(each, PASSES[pass_]) for name, each in peers.items()}
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
            timing = self._summarize(times[name])
            exposed = timing.ms - self._summarize(alone[name]).ms if name in alone else None
            row = {"ms": timing.ms, "ms_p10": timing.ms_p10, "ms_p90": timing.ms_p90}
            yield {**row, "exposed_comm_ms": exposed, **fact}

    def _facts(
        self, name: str, launch: Callable[[], object], sent: Callable[[], int]
    ) -> dict[str, Any]:
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
            "transport": Communicator(self._group.group_name).transport if is_sent else None,
        }

    def _turn(self, launch: Callable[[], object]) -> list[float]:
        """Milliseconds on this rank, once the clock has followed the launch's power."""
        begin, elapsed = time.monotonic(), 0.0
        while elapsed <= self._settle_seconds:
            self._time(launch)
            (elapsed,) = self.largest([time.monotonic() - begin])
        return [self._time(launch) for _ in range(self._launches)]

    def _time(self, launch: Callable[[], object]) -> float:
        self.largest([0.0])  # all ranks begin together
        self._stopwatch.synchronize()
        begin = self._stopwatch.mark()
        launch()
        end = self._stopwatch.mark()
        end.wait()
        return end.ms_since(begin)

    def _summarize(self, times: Sequence[float]) -> Timing:
        return summarize(self.largest(times), len(times))


def trace(launches: Launches, path: Path) -> None:
    """A forward and backward under the profiler, which benchmarks/ring_timeline.py draws.

    One before it is in the trace too: ranks begin that one apart, as profilers take their time.
    """

    def launch() -> None:
        launches.both()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        launch()
        with torch.profiler.record_function(DRAWN):
            launch()
    profiler.export_chrome_trace(str(path))


def start(names: Sequence[str], case: Case) -> tuple[dict[str, Launches], list[dict[str, Any]]]:
    """Those that ran once, and why the others did not: a peer that fails, fails on all ranks."""
    peers, skipped = {}, []
    for name in names:
        try:
            launches = make_launches(name, case)
            for method in PASSES.values():
                getattr(launches, method)()
            peers[name] = launches
        except Exception as error:  # of a first launch; it must not end the run
            skipped.append({"strategy": name, "reason": reason(error)})
    return peers, skipped


def measure(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> None:
    started = datetime.datetime.now(datetime.timezone.utc)
    document = describe(device, make_monitor(device), options.commit)
    document |= {"device_type": device.type, "date": started.isoformat(timespec="seconds")}
    document |= {"world_size": group.size(), "rows": [], "skipped": []}
    parts = ["ring", slug(document["device"]), f"{started:%Y-%m-%d}", slug(options.tag)]
    path: Path = options.out / ("-".join(part for part in parts if part) + ".json")
    bench = Bench(group, device, options.repeats, options.settle_seconds)
    document |= {"protocol": bench.protocol}

    def add(kind: str, case: Case, entry: dict[str, Any]) -> None:
        entry = {"workload": case.workload.name, "causal": case.is_causal, **entry}
        document[kind].append(entry)
        if group.rank() == 0:
            print(entry, file=sys.stderr)
            schema.write(path, document)

    for workload in select(options):
        dtype = workload.torch_dtype if device.type == "cuda" else torch.float32
        inputs = Inputs.make(workload, device, dtype, seed=0)
        for causal in workload.causal:
            case = Case(workload, causal, inputs, group)
            peers, skipped = start(options.strategies, case)
            for entry in skipped:
                add("skipped", case, entry)
            for pass_ in PASSES:
                for name, row in zip(peers, bench.rows(peers, pass_), strict=True):
                    ranks = 1 if name == SINGLE else group.size()
                    identity = {"strategy": name, "world_size": ranks, "pass": pass_}
                    add("rows", case, {**identity, **row})
            for name, launches in peers.items() if options.trace else ():
                file = f"{workload.name}-{name}-{'causal' if causal else 'full'}"
                trace(launches, options.trace / f"{file}-rank{group.rank()}.json")
    if group.rank() == 0:
        print(path)


def select(options: argparse.Namespace) -> list[Workload]:
    found = [{**WORKLOADS, **RING_WORKLOADS}[name] for name in options.workloads]
    return [replace(w, seq_len=options.seq_len) if options.seq_len else w for w in found]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    begin = time.monotonic()
    group, device = connect(options.device)
    try:
        measure(options, group, device)
    finally:
        dist.destroy_process_group()
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
