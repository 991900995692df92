"""The caches of patterns, V2's and V3's, against each other and against none.

    python -m benchmarks.bench caches

The caches take turns, round by round. A step begins with the device idle and ends when it is idle
again: one call at a fixed length; for "slides" the calls of twelve layers at a length that no step
before had, of which V3 and v2-announced were told during the step before. V2's options are measured
each against its absence, where it could help.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import fmean, median
from typing import Any

import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache, dilated_attention
from dilated_attention_pytorch.pattern import (
    BasePatternCache,
    Pattern,
    PatternSpec,
    clear_planned_patterns,
)

from .peers.calls import Inputs
from .results import Row, Run, names
from .timing import Stopwatch, Timing, captured, percentile
from .workloads import CACHE_WORKLOADS, CacheWorkload, cache_workloads

CACHES = ("none", "v2", "v2-announced", "v3")
OPTIONS = {"batched transfer": "batch_transfers", "asynchronous transfer": "async_transfers"}
PARTS = ("planning", "transfer", "waiting", "management", "kernel")
ON_CPU = (
    "that the program runs; what caches save, copies to a GPU, is not there. `slides` and "
    "longnet-128k take hours: name the others by --workloads."
)
BUDGET_SECONDS = 90.0
SLIDES = 1000  # distinct lengths
ROUNDS = 40  # of each cache
ROUND_MS = 15.0  # at fixed lengths, roughly
LARGE = 1048576  # positions of a large pattern
_NONE_EVERY = 4  # without a cache, changing lengths are measured in every fourth round only
_WARM_STEPS = 5  # more than it takes V3 to make a pattern hot
_HITS = 5000
_SPLIT_STEPS = 100  # of which a step's parts are averages
_CPU = torch.device("cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", type=names(CACHE_WORKLOADS), default=list(CACHE_WORKLOADS))


def measure(run: Run, options: argparse.Namespace) -> None:
    protocol = {"rounds": ROUNDS, "slides": SLIDES, "round_ms": ROUND_MS}
    workloads = cache_workloads(SLIDES)
    hits = list(_measure_hits(run, workloads[0].spec(0)))
    run.document |= {"protocol": protocol, "hits": hits, "options": []}
    for workload in workloads:
        if workload.base.name in options.workloads:
            rows = list(_measure_rounds(run, workload))
            run.rows.extend(rows)
            times = ", ".join(f"{row['cache']} {row['ms']:.4g}" for row in rows)
            run.say(f"{workload.base.name}: {times} ms a step")
            run.write()
    for entry in _measure_options(run, workloads[-1]):
        off, on = (percentile(entry[name], 50) for name in ("off_ms", "on_ms"))
        run.say(f"{entry['option']}: {off:.4g} ms without, {on:.4g} with")
        run.document["options"].append(entry)


def _measure_rounds(run: Run, workload: CacheWorkload) -> Iterator[Row]:
    """All caches on one workload, in turn; changing lengths are dealt out, fixed ones repeated."""
    inputs = Inputs.make(workload.base, run.device)
    # Where the length stays, nothing is announced.
    chosen = [name for name in CACHES if workload.is_changing or name != "v2-announced"]
    peers = {name: Steps(workload, inputs, name) for name in chosen}
    for steps in peers.values():  # compiles, allocates, fills the caches
        for _ in range(_WARM_STEPS):
            steps.run(0)
        if workload.is_changing and steps.cache is not None:
            steps.cache.drain()
            steps.cache.clear()
    size = len(workload.lengths) // ROUNDS
    if not workload.is_changing:
        size = max(1, round(ROUND_MS / peers["v2"].milliseconds(range(3), run.stopwatch)))
    samples: dict[str, dict[str, float]] = {name: {} for name in peers}
    bare = bare_call(workload, inputs, run.stopwatch)
    for index in range(ROUNDS):
        if index > 1 and run.is_late():
            run.skip(f"{ROUNDS - index} of {ROUNDS} rounds: no time", workload=workload.base.name)
            break
        turn = index % len(peers)
        for name in chosen[turn:] + chosen[:turn]:
            if name != "none" or not workload.is_changing or index % _NONE_EVERY == 0:
                mine = range(index * size, (index + 1) * size)
                samples[name][str(index)] = peers[name].milliseconds(mine, run.stopwatch)
    for name, steps in peers.items():
        counts = None if steps.cache is None else steps.cache.statistics()
        on_device, in_all = (counts.device_bytes, counts.bytes) if counts else (0, 0)
        yield {
            "workload": workload.base.name,
            "cache": name,
            **Timing([*samples[name].values()]).columns,
            **split(workload, inputs, name, run.stopwatch, *bare),
            "gpu_mib": on_device / 2**20,
            "host_mib": (in_all - on_device) / 2**20,
            "hit_rate": counts.hit_rate if counts else 0.0,
            "calls": workload.calls,
            "samples_ms": samples[name],
            "statistics": asdict(counts) if counts else None,
        }


class Steps:
    """A workload's steps with one of CACHES, which is new."""

    def __init__(self, workload: CacheWorkload, inputs: Inputs, name: str) -> None:
        self._workload, self._inputs = workload, inputs
        self._is_told = workload.is_changing and name in ("v2-announced", "v3")
        self.cache: BasePatternCache | None = None
        if name != "none":
            self.cache = TieredPatternCache() if name == "v3" else PatternCache()

    def call(self, step: int) -> Callable[[], object]:
        """One call of a step, as a user makes it."""
        seq_len = self._workload.spec(step).seq_len
        query, key, value = (x[:, :seq_len] for x in self._inputs.qkv)
        cache = False if self.cache is None else self.cache
        options = {**self._workload.base.arguments, "pattern_cache": cache}

        def attend() -> object:
            if cache is False:
                clear_planned_patterns()  # what the operators keep by themselves
            return dilated_attention(query, key, value, **options)

        return attend

    def run(self, step: int) -> None:
        """Tells a cache that is to be told what the next step's length is."""
        if self.cache is not None and self._is_told:
            self.cache.announce([self._workload.spec(step + 1)], self._inputs.query.device)
        call = self.call(step)
        for _ in range(self._workload.calls):
            call()

    def milliseconds(self, steps: Sequence[int], stopwatch: Stopwatch) -> float:
        """A step's, on average: from the device being idle to its being idle again."""
        return fmean(stopwatch.wall_ms(lambda step=step: self.run(step)) for step in steps)  # type: ignore[misc]


def clock(cache: BasePatternCache, *methods: str) -> list[float]:
    """Milliseconds that this thread spends in methods that don't call one another, call by call."""
    me, spent = threading.get_ident(), list[float]()

    def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            if threading.get_ident() == me:
                spent.append((time.perf_counter() - began) * 1e3)

    for method in methods:
        setattr(cache, method, partial(timed, getattr(cache, method)))
    return spent


def bare_call(workload: CacheWorkload, inputs: Inputs, stopwatch: Stopwatch) -> tuple[float, float]:
    """Milliseconds of the device for a step's calls, and of the host for one: the pattern is there.

    The device's is that of a CUDA graph, in which it never waits for the host.
    """
    known, kernels, hosts = Steps(workload, inputs, "v2"), [], []
    for number in range(_SPLIT_STEPS):
        call = known.call(number)
        call()  # from here on its pattern is there
        hosts.append(stopwatch.host_ms(call))
        replay = captured(call, stopwatch.device)
        stopwatch.flush()  # meanwhile the host enqueues the calls
        kernels.append(stopwatch.ms(replay, workload.calls))
    average = fmean if workload.is_changing else median
    return average(kernels), fmean(hosts)


def split(
    workload: CacheWorkload,
    inputs: Inputs,
    name: str,
    stopwatch: Stopwatch,
    kernel_ms: float,
    bare_ms: float,
) -> dict[str, float]:
    """Milliseconds of the parts of a step; the last two arguments are what `bare_call` gives.

    planning, transfer: the host's time to plan, and to enqueue copies; of what is announced, on a
    thread of its own. waiting: the caller's, for a plan that this thread was making. management:
    the caller's time in the cache beyond that. kernel: the device's time for the calls.
    """
    steps, numbers = Steps(workload, inputs, name), range(_SPLIT_STEPS)
    parts = {f"{part}_ms": 0.0 for part in PARTS} | {"kernel_ms": kernel_ms}
    if steps.cache is None:
        # The operator plans and copies within the call: what planning does not explain is transfer.
        plans = [stopwatch.host_ms(lambda n=n: Pattern.plan(workload.spec(n))) for n in numbers]  # type: ignore[misc]
        whole = [stopwatch.host_ms(steps.call(number)) for number in numbers]
        rest = fmean(whole) - bare_ms - fmean(plans)
        parts["planning_ms"] = fmean(plans) * workload.calls
        parts["transfer_ms"] = max(0.0, rest) * workload.calls
        return parts
    for _ in range(0 if workload.is_changing else _WARM_STEPS):
        steps.run(0)
    inside = clock(steps.cache, "find", "lookup_missing", "announce")
    making = clock(steps.cache, "_make", "_send")
    before = steps.cache.statistics()
    steps.milliseconds(numbers, stopwatch)
    after = steps.cache.statistics()
    for part in ("planning", "transfer", "waiting"):
        seconds = getattr(after, f"{part}_seconds") - getattr(before, f"{part}_seconds")
        parts[f"{part}_ms"] = seconds * 1e3 / len(numbers)
    managing = (sum(inside) - sum(making)) / len(numbers) - parts["waiting_ms"]
    return parts | {"management_ms": max(0.0, managing)}


def _measure_hits(run: Run, spec: PatternSpec) -> Iterator[Row]:
    """The host's time for a look-up that finds its words there, the key's making included."""
    caches: dict[str, BasePatternCache] = {"v2": PatternCache(), "v3": TieredPatternCache()}
    for name, cache in caches.items():

        def look_up(cache: BasePatternCache = cache) -> None:
            for _ in range(_HITS):
                cache.lookup(PatternSpec(*spec), run.device)

        look_up()  # plans, copies, makes the pattern hot
        times = [run.stopwatch.host_ms(look_up) * 1e3 / _HITS for _ in range(7)]
        yield {"cache": name, "us": min(times), "us_median": percentile(times, 50)}


def _measure_options(run: Run, slides: CacheWorkload) -> Iterator[Row]:
    """Each option of V2 on and off in turn, after one measurement of each that does not count."""
    device = run.device
    shortest = sorted(slides.spec(step) for step in range(len(slides.lengths)))[:32]
    large = shortest[0]._replace(seq_len=LARGE)
    busy = torch.randn(2048, 2048, device=device)

    def announced(cache: PatternCache) -> float:
        cache.prefetch(shortest, _CPU)
        return run.stopwatch.wall_ms(lambda: cache.prefetch(shortest, device))

    def behind_work(cache: PatternCache) -> float:
        cache.prefetch([large], _CPU)

        def use() -> None:
            for _ in range(100 if device.type == "cuda" else 0):
                torch.mm(busy, busy)
            _, words = cache.lookup(large, device)
            words.sum()
            sum(range(100_000))  # some milliseconds of what a program does besides

        return run.stopwatch.wall_ms(use)

    places = {
        "the 32 shortest slides, planned already, announced together": announced,
        "the first use of a pattern over 10 MB, behind work that is under way": behind_work,
    }
    for (option, name), (where, once) in zip(OPTIONS.items(), places.items(), strict=True):
        if run.is_late():
            run.skip("no time", option=option)
            continue
        samples: dict[bool, list[float]] = {False: [], True: []}
        for index in range(ROUNDS // 2 + 1):
            for is_on in (False, True) if index % 2 else (True, False):
                samples[is_on].append(once(PatternCache(**{name: is_on})))
        times = {"off_ms": samples[False][1:], "on_ms": samples[True][1:]}
        yield {"option": option, "where": where, **times}
