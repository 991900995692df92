"""Measures attention over a sequence that is sharded over ranks, and its peers.

    torchrun --nproc-per-node 2 -m benchmarks.bench_ring
    torchrun --nproc-per-node 2 -m benchmarks.bench_ring --trace build/trace --workloads llm-128k

Writes benchmarks/results/ring-<device>-<date>.json. On GPUs over NCCL, else over gloo. A launch's
time is that of its slowest rank. exposed_comm_ms is what a launch takes beyond the same launch with
nothing exchanged. bytes_per_rank is what the busiest rank sends.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dilated_attention_pytorch.ring.exchange import Peers

from . import schema
from .calls import Inputs, reason
from .device_state import make_monitor
from .environment import RESULTS, describe, slug
from .ring_peers import NAMES, SINGLE, STRATEGIES, Case, Launches, make_launches, without_exchange
from .ring_timeline import DRAWN
from .timing import Stopwatch, peak_mib, summarize
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
    parser.add_argument("--repeats", type=int, default=20)
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

    def __init__(self, group: dist.ProcessGroup, device: torch.device, repeats: int) -> None:
        self._group, self._repeats = group, repeats
        self._stopwatch = Stopwatch(device)

    def largest(self, values: Sequence[float]) -> list[float]:
        """Each value's largest over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._stopwatch.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return [float(value) for value in tensor]

    def times(self, launch: Callable[[], object]) -> list[float]:
        """Milliseconds of each launch."""
        for _ in range(2):
            launch()
        values = []
        for _ in range(self._repeats):
            self.largest([0.0])  # all ranks begin together
            self._stopwatch.synchronize()
            begin = self._stopwatch.mark()
            launch()
            end = self._stopwatch.mark()
            end.wait()
            values.append(end.ms_since(begin))
        return self.largest(values)

    def row(self, name: str, launches: Launches, pass_: str) -> dict[str, Any]:
        """The measured columns."""
        launch: Callable[[], object] = getattr(launches, PASSES[pass_])
        launch()
        before = launches.sent()
        launch()
        sent = launches.sent() - before
        peak = peak_mib(launch, self._stopwatch)
        timing = summarize(self.times(launch), self._repeats)
        exposed = None
        if name in STRATEGIES:
            with without_exchange():
                alone = summarize(self.times(launch), self._repeats)
            exposed = timing.ms - alone.ms
        transport = Peers(self._group.group_name).transport if name in STRATEGIES else None
        most_sent, most_memory = self.largest([sent, peak or 0.0])
        return {
            "ms": timing.ms,
            "ms_p10": timing.ms_p10,
            "ms_p90": timing.ms_p90,
            "exposed_comm_ms": exposed,
            "bytes_per_rank": int(most_sent),
            "peak_mib": None if peak is None else most_memory,
            "transport": transport,
        }


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


def peer_rows(bench: Bench, name: str, case: Case, traces: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each pass, and then a trace in the folder, if one is given."""
    launches = make_launches(name, case)
    row: dict[str, Any] = {"workload": case.workload.name, "causal": case.is_causal}
    row |= {"strategy": name, "world_size": 1 if name == SINGLE else case.group.size()}
    for pass_ in PASSES:
        yield {**row, "pass": pass_, **bench.row(name, launches, pass_)}
    if traces:
        file = f"{case.workload.name}-{name}-{'causal' if case.is_causal else 'full'}"
        trace(launches, traces / f"{file}-rank{case.group.rank()}.json")


def measure(options: argparse.Namespace, group: dist.ProcessGroup, device: torch.device) -> None:
    started = datetime.datetime.now(datetime.timezone.utc)
    document = describe(device, make_monitor(device), options.commit)
    document |= {"device_type": device.type, "date": started.isoformat(timespec="seconds")}
    document |= {"world_size": group.size(), "rows": [], "skipped": []}
    parts = ["ring", slug(document["device"]), f"{started:%Y-%m-%d}", slug(options.tag)]
    path: Path = options.out / ("-".join(part for part in parts if part) + ".json")
    bench = Bench(group, device, options.repeats)

    def say(entry: dict[str, Any]) -> None:
        if group.rank() == 0:
            print(entry, file=sys.stderr)

    for workload in select(options):
        dtype = workload.torch_dtype if device.type == "cuda" else torch.float32
        inputs = Inputs.make(workload, device, dtype, seed=0)
        for causal in workload.causal:
            case = Case(workload, causal, inputs, group)
            for name in options.strategies:
                try:
                    for row in peer_rows(bench, name, case, options.trace):
                        document["rows"].append(row)
                        say(row)
                except Exception as error:  # a peer that fails on all ranks must not end the run
                    head = {"workload": workload.name, "causal": causal, "strategy": name}
                    document["skipped"].append({**head, "reason": reason(error)})
                    say(document["skipped"][-1])
                if group.rank() == 0:
                    schema.write(path, document)
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
