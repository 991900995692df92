"""Measures V2's and V3's caches and none; writes benchmarks/results/caches-<device>-<date>.json.

    python -m benchmarks.bench_caches

The caches take turns, round by round. A step begins with the device idle and ends when it is idle
again: one call at a fixed length; for "slides" the calls of twelve layers at a length that no step
before had, of which V3 was told during the step before. Run from the repository's root, with the
library installed; `python -m benchmarks.report_caches` makes the report.
"""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch import TieredPatternCache
from dilated_attention_pytorch.pattern import BasePatternCache, PatternSpec

from . import cache_options, schema
from .cache_split import split
from .cache_workloads import (
    CACHES,
    CacheWorkload,
    Steps,
    cache_workloads,
    make_cache,
    make_inputs,
)
from .device_state import make_monitor
from .environment import RESULTS, describe, slug
from .timing import Stopwatch, percentile

WARM_STEPS = 5  # more than it takes V3 to make a pattern hot
_SPLIT_STEPS = 100
_NONE_EVERY = 4  # without a cache, changing lengths are measured in every fourth round only
_HITS = 5000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_caches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write into")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", type=lambda text: text.split(","), help="names")
    parser.add_argument("--slides", type=int, default=1000, help="distinct lengths")
    parser.add_argument("--rounds", type=int, default=40, help="of each cache, and of each option")
    parser.add_argument("--round-ms", type=float, default=15.0, help="at fixed lengths, roughly")
    parser.add_argument("--large", type=int, default=1048576, help="length of a large pattern")
    parser.add_argument("--budget-seconds", type=float, default=90.0)
    return parser.parse_args(arguments)


def rounds_of(
    workload: CacheWorkload, rounds: int, estimate: float, round_ms: float
) -> list[range]:
    """The steps of each round: changing lengths are dealt out, fixed ones repeated."""
    if workload.is_changing:
        size = max(1, len(workload.lengths) // rounds)
        return [range(first, first + size) for first in range(0, size * rounds, size)]
    return [range(max(1, round(round_ms / estimate)))] * rounds


def forget(cache: BasePatternCache | None) -> None:
    if isinstance(cache, TieredPatternCache):
        cache.drain()
    if cache is not None:
        cache.clear()


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._device = torch.device(options.device)
        if self._device.type == "cuda" and self._device.index is None:
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._stopwatch = Stopwatch(self._device)
        self._deadline: float = time.monotonic() + options.budget_seconds
        now = datetime.datetime.now(datetime.timezone.utc)
        self._document: dict[str, Any] = describe(
            self._device, make_monitor(self._device), options.commit
        )
        self._document |= {
            "date": now.isoformat(timespec="seconds"),
            "device_type": self._device.type,
            "protocol": {
                "rounds": options.rounds,
                "slides": options.slides,
                "round_ms": options.round_ms,
            },
            "rows": [],
            "hits": [],
            "options": [],
            "skipped": [],
        }
        name = f"caches-{slug(self._document['device'])}-{now:%Y-%m-%d}.json"
        self.path: Path = options.out / name

    def measure(self) -> None:
        workloads = cache_workloads(self._options.slides)
        self._document["hits"] = list(self._hits(workloads[0]))
        for workload in workloads:
            if self._options.workloads is None or workload.name in self._options.workloads:
                for row in self._rows(workload):
                    self._document["rows"].append(row)
                    _print(row)
                self.write()
        scenes = cache_options.Scenes(workloads[-1], self._device, self._options.large)
        for option in cache_options.options(scenes):
            if self._is_late():
                self._document["skipped"].append({"option": option.name, "reason": "no time"})
            else:
                rounds = max(2, self._options.rounds // 2)
                self._document["options"].append(cache_options.measure(option, rounds))
                print(option.name, flush=True)
        self.write()

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _rows(self, workload: CacheWorkload) -> Iterator[dict[str, Any]]:
        inputs = make_inputs(workload, self._device)
        peers = {name: Steps(workload, inputs, make_cache(name)) for name in CACHES}
        for steps in peers.values():  # compiles, allocates, fills the caches
            for _ in range(WARM_STEPS):
                steps.run(0)
        estimate = peers["v2"].milliseconds(range(3), self._stopwatch)
        rounds = rounds_of(workload, self._options.rounds, estimate, self._options.round_ms)
        if workload.is_changing:
            for steps in peers.values():
                forget(steps.cache)
        samples = self._take_turns(workload, peers, rounds)
        for name, steps in peers.items():
            yield self._row(steps, name, samples[name])

    def _take_turns(
        self, workload: CacheWorkload, peers: dict[str, Steps], rounds: list[range]
    ) -> dict[str, dict[int, float]]:
        """Milliseconds of a step, by cache and round."""
        samples: dict[str, dict[int, float]] = {name: {} for name in peers}
        for index, numbers in enumerate(rounds):
            if index > 1 and self._is_late():
                reason = f"{len(rounds) - index} of {len(rounds)} rounds: no time"
                self._document["skipped"].append({"workload": workload.name, "reason": reason})
                break
            turn = index % len(CACHES)
            for name in CACHES[turn:] + CACHES[:turn]:
                if name != "none" or not workload.is_changing or index % _NONE_EVERY == 0:
                    samples[name][index] = peers[name].milliseconds(numbers, self._stopwatch)
        return samples

    def _row(self, steps: Steps, name: str, samples: dict[int, float]) -> dict[str, Any]:
        statistics = None if steps.cache is None else steps.cache.statistics()
        on_device = 0 if statistics is None else statistics.device_bytes
        in_all = 0 if statistics is None else statistics.bytes
        workload = steps.workload
        numbers = range(min(_SPLIT_STEPS, len(workload.lengths) if workload.is_changing else 50))
        fresh = steps.with_cache(make_cache(name))
        parts = split(fresh, numbers, 0 if workload.is_changing else WARM_STEPS, self._stopwatch)
        values = list(samples.values())
        return {
            "workload": workload.name,
            "cache": name,
            "ms": percentile(values, 50),
            "ms_p10": percentile(values, 10),
            "ms_p90": percentile(values, 90),
            **parts.to_json(),
            "gpu_mib": on_device / 2**20,
            "host_mib": (in_all - on_device) / 2**20,
            "hit_rate": 0.0 if statistics is None else statistics.hit_rate,
            "calls": workload.calls,
            "samples_ms": {str(index): value for index, value in samples.items()},
            "statistics": None if statistics is None else asdict(statistics),
        }

    def _hits(self, workload: CacheWorkload) -> Iterator[dict[str, Any]]:
        """The host's time for a look-up that finds its words there, the key's making included."""
        spec = workload.spec(0)
        for name in CACHES[1:]:
            cache = make_cache(name)
            assert cache is not None
            for _ in range(WARM_STEPS):
                cache.lookup(spec, self._device)
            self._stopwatch.synchronize()
            times = []
            for _ in range(7):
                began = time.perf_counter()
                for _ in range(_HITS):
                    cache.lookup(PatternSpec(*spec), self._device)
                times.append((time.perf_counter() - began) * 1e6 / _HITS)
            is_hot = not isinstance(cache, TieredPatternCache) or cache.statistics().hot_hits > 0
            yield {
                "cache": name,
                "us": min(times),
                "us_median": percentile(times, 50),
                "hot": is_hot,
            }

    def write(self) -> None:
        schema.write(self.path, self._document)


def _print(row: dict[str, Any]) -> None:
    parts = "  ".join(
        f"{name} {row[f'{name}_ms']:.4f}"
        for name in ("planning", "transfer", "waiting", "management", "kernel")
    )
    print(
        f"{row['workload']:14} {row['cache']:5} {row['ms']:10.4f} ms "
        f"[{row['ms_p10']:.4f}, {row['ms_p90']:.4f}]  {parts}  hit rate {row['hit_rate']:.3f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> Path:
    run = Run(parse(arguments))
    run.measure()
    print(run.path)
    return run.path


if __name__ == "__main__":
    main()
