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
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache
from dilated_attention_pytorch.pattern import PatternSpec

from .cache_steps import NAMES, OPTIONS, CacheWorkload, Steps, cache_workloads, make_cache, split
from .peers.calls import Inputs
from .results import Row, Run, names
from .timing import Stopwatch, percentile, summarize

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
            rows = list(Rounds(run, options, workload).rows())
            run.rows.extend(rows)
            times = ", ".join(f"{row['cache']} {row['ms']:.4g}" for row in rows)
            run.say(f"{workload.name}: {times} ms a step")
            run.write()
    for entry in measure_options(run, workloads[-1], options.large, max(2, options.rounds // 2)):
        off, on = (percentile(entry[name], 50) for name in ("off_ms", "on_ms"))
        run.say(f"{entry['option']}: {off:.4g} ms without, {on:.4g} with")
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


class Rounds:
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
        row: Row = {"workload": self._workload.name, "cache": steps.name}
        row |= summarize(values, len(values)).columns
        row |= split(steps.renewed(), numbers, warm, self._run.stopwatch)
        row |= {"gpu_mib": on_device / 2**20, "host_mib": (in_all - on_device) / 2**20}
        row["hit_rate"] = 0.0 if statistics is None else statistics.hit_rate
        row["calls"] = self._workload.calls
        row["samples_ms"] = {str(index): value for index, value in samples.items()}
        return row | {"statistics": None if statistics is None else asdict(statistics)}


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


def measure_options(
    run: Run, slides: CacheWorkload, large_seq_len: int, rounds: int
) -> Iterator[Row]:
    """Each option of V2 on and off in turn, after one measurement of each that does not count."""
    device, stopwatch = run.device, run.stopwatch
    specs = [slides.spec(step) for step in range(len(slides.lengths))]
    large = specs[0]._replace(seq_len=large_seq_len)
    busy = torch.randn(2048, 2048, device=device) if device.type == "cuda" else None

    def use(cache: PatternCache) -> None:
        if busy is not None:
            for _ in range(100):
                torch.mm(busy, busy)
        _, words = cache.lookup(large, device)
        words.sum()
        sum(range(100_000))  # some milliseconds of what a program does besides

    def announced(cache: PatternCache) -> float:
        shortest = sorted(specs)[:32]
        cache.prefetch(shortest, _CPU)
        return stopwatch.wall_ms(lambda: cache.prefetch(shortest, device))

    def behind_work(cache: PatternCache) -> float:
        cache.prefetch([large], _CPU)
        return stopwatch.wall_ms(lambda: use(cache))

    places = {
        "the 32 shortest slides, planned already, announced together": announced,
        "the first use of a pattern over 10 MB, behind work that is under way": behind_work,
    }
    for (option, name), (where, measure_once) in zip(OPTIONS.items(), places.items(), strict=True):
        if run.is_late():
            run.skip("no time", option=option)
            continue
        samples: dict[bool, list[float]] = {False: [], True: []}
        for index in range(rounds + 1):
            for is_on in (False, True) if index % 2 else (True, False):
                samples[is_on].append(measure_once(PatternCache(**{name: is_on})))
        off, on = (samples[is_on][1:] for is_on in (False, True))
        settings = {"setting": {name: True}, "absence": {name: False}, "where": where}
        yield {"option": option, **settings, "off_ms": off, "on_ms": on}
