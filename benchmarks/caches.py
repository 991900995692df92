"""The caches of patterns, V2's and V3's, against each other and against none.

    python -m benchmarks.bench caches

The caches take turns, round by round. A step begins with the device idle and ends when it is idle
again: one call at a fixed length; for "slides" the calls of twelve layers at a length that no step
before had, of which V3 and v2-announced were told during the step before. V2's options are measured
each against its absence, where it could help.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache
from dilated_attention_pytorch.pattern import PatternSpec

from .cache_steps import NAMES, OPTIONS, CacheWorkload, Steps, cache_workloads, make_cache, split
from .peers.calls import Inputs
from .results import Row, Run, names
from .timing import Stopwatch, percentile

ON_CPU = (
    "that the program runs; what caches save, copies to a GPU, is not there. `slides` and "
    "longnet-128k take hours: name the others by --workloads."
)
BUDGET_SECONDS = 90.0
WARM_STEPS = 5  # more than it takes V3 to make a pattern hot
_SPLIT_STEPS = 100
_NONE_EVERY = 4  # without a cache, changing lengths are measured in every fourth round only
_HITS = 5000
_CPU = torch.device("cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", type=names(NAMES), default=list(NAMES))
    parser.add_argument("--slides", type=int, default=1000, help="distinct lengths")
    parser.add_argument("--rounds", type=int, default=40, help="of each cache, and of each option")
    parser.add_argument("--round-ms", type=float, default=15.0, help="at fixed lengths, roughly")
    parser.add_argument("--large", type=int, default=1048576, help="length of a large pattern")


def measure(options: argparse.Namespace) -> Path:
    run = Run("caches", options)
    chosen = {name: getattr(options, name) for name in ("rounds", "slides", "round_ms")}
    workloads = cache_workloads(options.slides)
    hits = list(measure_hits(workloads[0], run.stopwatch))
    run.document |= {"protocol": chosen, "hits": hits, "options": []}
    for workload in workloads:
        if workload.name in options.workloads:
            rows = list(Comparison(run, options, workload).rows())
            run.rows.extend(rows)
            times = ", ".join(f"{row['cache']} {row['ms']:.4g}" for row in rows)
            run.say(f"{workload.name}: {times} ms a step")
            run.write()
    for entry in Options(workloads[-1], run.stopwatch, options.large).all():
        if run.is_late():
            run.skip("no time", option=entry["option"])
            continue
        entry |= measure_option(entry, max(2, options.rounds // 2))
        off, on = (percentile(entry[name], 50) for name in ("off_ms", "on_ms"))
        run.say(f"{entry['option']}: {off:.4g} ms without, {on:.4g} with")
        del entry["run"]
        run.document["options"].append(entry)
    run.write()
    return run.path


def rounds_of(
    workload: CacheWorkload, rounds: int, estimate: float, round_ms: float
) -> list[range]:
    """The steps of each round: changing lengths are dealt out, fixed ones repeated."""
    if workload.is_changing:
        size = max(1, len(workload.lengths) // rounds)
        return [range(first, first + size) for first in range(0, size * rounds, size)]
    return [range(max(1, round(round_ms / estimate)))] * rounds


class Comparison:
    """All caches on one workload."""

    def __init__(self, run: Run, options: argparse.Namespace, workload: CacheWorkload) -> None:
        self._run, self._options, self._workload = run, options, workload
        dtype = workload.base.torch_dtype if run.device.type == "cuda" else torch.float32
        inputs = Inputs.make(workload.base, run.device, dtype, seed=0)
        self._peers = {name: Steps(workload, inputs, name) for name in workload.caches}

    def rows(self) -> Iterator[Row]:
        for steps in self._peers.values():  # compiles, allocates, fills the caches
            for _ in range(WARM_STEPS):
                steps.run(0)
        estimate = self._peers["v2"].milliseconds(range(3), self._run.stopwatch)
        options = self._options
        rounds = rounds_of(self._workload, options.rounds, estimate, options.round_ms)
        if self._workload.is_changing:
            for steps in self._peers.values():
                steps.forget()
        samples = self._take_turns(rounds)
        for name, steps in self._peers.items():
            yield self._row(steps, samples[name])

    def _take_turns(self, rounds: list[range]) -> dict[str, dict[int, float]]:
        """Milliseconds of a step, by cache and round."""
        samples: dict[str, dict[int, float]] = {name: {} for name in self._peers}
        is_changing, caches = self._workload.is_changing, self._workload.caches
        for index, numbers in enumerate(rounds):
            if index > 1 and self._run.is_late():
                reason = f"{len(rounds) - index} of {len(rounds)} rounds: no time"
                self._run.skip(reason, workload=self._workload.name)
                break
            turn = index % len(caches)
            for name in caches[turn:] + caches[:turn]:
                if name != "none" or not is_changing or index % _NONE_EVERY == 0:
                    steps = self._peers[name]
                    samples[name][index] = steps.milliseconds(numbers, self._run.stopwatch)
        return samples

    def _row(self, steps: Steps, samples: dict[int, float]) -> Row:
        statistics = None if steps.cache is None else steps.cache.statistics()
        on_device = 0 if statistics is None else statistics.device_bytes
        in_all = 0 if statistics is None else statistics.bytes
        is_changing = self._workload.is_changing
        numbers = range(min(_SPLIT_STEPS, len(self._workload.lengths) if is_changing else 50))
        warm = 0 if is_changing else WARM_STEPS
        values = list(samples.values())
        return {
            "workload": self._workload.name,
            "cache": steps.name,
            "ms": percentile(values, 50),
            "ms_p10": percentile(values, 10),
            "ms_p90": percentile(values, 90),
            **split(steps.renewed(), numbers, warm, self._run.stopwatch),
            "gpu_mib": on_device / 2**20,
            "host_mib": (in_all - on_device) / 2**20,
            "hit_rate": 0.0 if statistics is None else statistics.hit_rate,
            "calls": self._workload.calls,
            "samples_ms": {str(index): value for index, value in samples.items()},
            "statistics": None if statistics is None else asdict(statistics),
        }


def measure_hits(workload: CacheWorkload, stopwatch: Stopwatch) -> Iterator[Row]:
    """The host's time for a look-up that finds its words there, the key's making included."""
    spec, device = workload.spec(0), stopwatch.device
    for name in ("v2", "v3"):
        cache = make_cache(name)
        assert cache is not None
        for _ in range(WARM_STEPS):
            cache.lookup(spec, device)
        stopwatch.synchronize()
        times = []
        for _ in range(7):
            began = time.perf_counter()
            for _ in range(_HITS):
                cache.lookup(PatternSpec(*spec), device)
            times.append((time.perf_counter() - began) * 1e6 / _HITS)
        is_hot = not isinstance(cache, TieredPatternCache) or cache.statistics().hot_hits > 0
        yield {"cache": name, "us": min(times), "us_median": percentile(times, 50), "hot": is_hot}


class Options:
    """What V2's options are measured on: patterns of the slides workload, on one device."""

    def __init__(self, slides: CacheWorkload, stopwatch: Stopwatch, large_seq_len: int) -> None:
        self._specs = [slides.spec(step) for step in range(len(slides.lengths))]
        self._large = self._specs[0]._replace(seq_len=large_seq_len)
        self._stopwatch, self._device = stopwatch, stopwatch.device
        is_cuda = self._device.type == "cuda"
        self._busy = torch.randn(2048, 2048, device=self._device) if is_cuda else None

    def all(self) -> list[dict[str, Any]]:
        """`run(cache)` gives the milliseconds of one measurement with a new cache."""
        batched = "the 32 shortest slides, planned already, announced together"
        behind = "the first use of a pattern over 10 MB, behind work that is under way"
        places = {batched: self.announced, behind: self.behind_work}
        return [
            {"option": option, "setting": {name: True}, "absence": {name: False}, "where": where}
            | {"run": run}
            for (option, name), (where, run) in zip(OPTIONS.items(), places.items(), strict=True)
        ]

    def announced(self, cache: PatternCache, count: int = 32) -> float:
        """The copies of many small patterns, which are planned already."""
        specs = sorted(self._specs)[:count]
        cache.prefetch(specs, _CPU)
        return self._stopwatch.wall_ms(lambda: cache.prefetch(specs, self._device))

    def behind_work(self, cache: PatternCache) -> float:
        """A large pattern's first use behind work that is under way, and host work after it."""
        cache.prefetch([self._large], _CPU)
        return self._stopwatch.wall_ms(lambda: self._use(cache))

    def _use(self, cache: PatternCache) -> None:
        if self._busy is not None:
            for _ in range(100):
                torch.mm(self._busy, self._busy)
        _, words = cache.lookup(self._large, self._device)
        words.sum()
        sum(range(100_000))  # some milliseconds of what a program does besides


def measure_option(option: dict[str, Any], rounds: int) -> dict[str, Sequence[float]]:
    """Both settings in turn, after one measurement of each that does not count."""
    off: list[float] = []
    on: list[float] = []
    for index in range(rounds + 1):
        pair = ((off, option["absence"]), (on, option["setting"]))
        for samples, setting in pair if index % 2 else reversed(pair):
            samples.append(option["run"](PatternCache(**setting)))
    return {"off_ms": off[1:], "on_ms": on[1:]}
