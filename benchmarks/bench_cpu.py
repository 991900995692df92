"""Measures the CPU kernels against PyTorch's CPU attention, one call per branch and offset.

    python -m benchmarks.bench_cpu --repeats 7 --json cpu.json

Both compute the same thing: the peer calls scaled_dot_product_attention's CPU kernel on strided
views and merges by the log-sum-exps; `calls` are its attention calls alone. Who is compared runs in
turn, in one process and with the same threads, so that what else the machine does falls on all.
Prints medians, minima and spread; GFLOP/s count each pair of positions once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calls import Calls, Inputs
from .environment import device_name, find_commit, versions
from .peers import ours
from .schema import Pass
from .sdpa_views import SdpaViews, library_bound
from .workloads import Workload, distinct_flops

WORKLOAD = Workload(
    "cpu-16k",
    "cpu",
    16384,
    8,
    64,
    (2048, 4096, 8192),
    (1, 2, 4),
    head_offsets="interleaved",
)
PREPARE: Mapping[str, Callable[[Workload, bool, Inputs], Calls]] = {
    "ours": ours,
    "sdpa-views": SdpaViews(),
    "calls": library_bound,
}
MEASURED: tuple[Pass, ...] = ("fwd", "fwd+bwd")
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of one implementation's pass; ratios are its median and its minimum over ours."""

    implementation: str
    causal: bool
    measured: Pass
    median: float
    minimum: float
    maximum: float
    gflops: float
    ratio: float
    ratio_of_minima: float


def interleaved(
    launches: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of each launch, `repeats` times in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in launches}
    for repeat in range(repeats + 1):
        for name, launch in launches.items():
            began = time.perf_counter()
            launch()
            if repeat > 0:
                times[name].append(time.perf_counter() - began)
    return times


def check(calls: Mapping[str, Calls]) -> None:
    """Raises RuntimeError unless ours and the peer agree: a wrong result has no speed."""
    mine, theirs = (_results(calls[name]) for name in ("ours", "sdpa-views"))
    for name, one, other in zip(("out", "dq", "dk", "dv"), mine, theirs, strict=True):
        error = (one - other).abs().max().item()
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name}: ours and the peer must agree, differ by {error:.1e}")


def _results(calls: Calls) -> list[Tensor]:
    out = calls.forward()
    gradients = calls.both() if calls.both else None
    assert out is not None and gradients is not None
    return [out, *gradients]


def measure(workload: Workload, causal: bool, repeats: int) -> list[Result]:
    inputs = Inputs.make(workload, torch.device("cpu"), torch.float32, seed=0)
    calls = {name: prepare(workload, causal, inputs) for name, prepare in PREPARE.items()}
    check(calls)
    results = []
    for pass_ in MEASURED:
        launches = {name: launch for name in calls if (launch := calls[name].get(pass_))}
        times = interleaved(launches, repeats)
        base, least = statistics.median(times["ours"]), min(times["ours"])
        for name, values in times.items():
            median = statistics.median(values)
            gflops = distinct_flops(workload, causal, pass_) / median * 1e-9
            spread = (median, min(values), max(values))
            ratios = (median / base, min(values) / least)
            results.append(Result(name, causal, pass_, *spread, gflops, *ratios))
    return results


def show(results: Sequence[Result]) -> None:
    print(
        "causal  pass     implementation  median s     min     max  GFLOP/s  time / ours  of minima"
    )
    for r in results:
        print(
            f"{r.causal!s:7} {r.measured:8} {r.implementation:14} {r.median:9.3f} {r.minimum:7.3f}"
            f" {r.maximum:7.3f} {r.gflops:8.1f} {r.ratio:12.2f} {r.ratio_of_minima:10.2f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_cpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="a file to write the results to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = [r for causal in (False, True) for r in measure(WORKLOAD, causal, options.repeats)]
    print(f"{device_name(torch.device('cpu'))}, {options.threads} threads, float32")
    show(results)
    if options.json:
        document: dict[str, Any] = {
            "commit": find_commit(None),
            "device": device_name(torch.device("cpu")),
            "versions": versions(),
            "threads": options.threads,
            "repeats": options.repeats,
            "workload": asdict(WORKLOAD) | {"dtype": "float32"},
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
