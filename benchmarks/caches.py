"""The caches of patterns, V2's and V3's, against each other and against none.

    python -m benchmarks.bench caches

The caches take turns, round by round. A step begins with the device idle and ends when it is idle
again: one call at a fixed length; for "slides" the calls of twelve layers at a length that no step
before had, of which V3 and v2-announced were told during the step before. V2's options are measured
each against its absence, where it could help.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache
from dilated_attention_pytorch.pattern import BasePatternCache, PatternSpec

from .cache_steps import NAMES, OPTIONS, CacheWorkload, Steps, cache_workloads, split
from .peers.calls import Inputs
from .results import Row, Run, names
from .timing import Timing, percentile

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
_HITS = 5000
_CPU = torch.device("cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workloads", type=names(NAMES), default=list(NAMES))


def measure(run: Run, options: argparse.Namespace) -> None:
    protocol = {"rounds": ROUNDS, "slides": SLIDES, "round_ms": ROUND_MS}
    workloads = cache_workloads(SLIDES)
    hits = list(_measure_hits(run, workloads[0].spec(0)))
    run.document |= {"protocol": protocol, "hits": hits, "options": []}
    for workload in workloads:
        if workload.name in options.workloads:
            rows = list(_measure_rounds(run, workload))
            run.rows.extend(rows)
            times = ", ".join(f"{row['cache']} {row['ms']:.4g}" for row in rows)
            run.say(f"{workload.name}: {times} ms a step")
            run.write()
    for entry in _measure_options(run, workloads[-1]):
        off, on = (percentile(entry[name], 50) for name in ("off_ms", "on_ms"))
        run.say(f"{entry['option']}: {off:.4g} ms without, {on:.4g} with")
        run.document["options"].append(entry)


def _measure_rounds(run: Run, workload: CacheWorkload) -> Iterator[Row]:
    """All caches on one workload, in turn; changing lengths are dealt out, fixed ones repeated."""
    inputs = Inputs.make(workload.base, run.device)
    peers = {name: Steps(workload, inputs, name) for name in workload.caches}
    for steps in peers.values():  # compiles, allocates, fills the caches
        steps.warm_up()
        if workload.is_changing and steps.cache is not None:
            steps.cache.drain()
            steps.cache.clear()
    if workload.is_changing:
        size = max(1, len(workload.lengths) // ROUNDS)
    else:
        size = max(1, round(ROUND_MS / peers["v2"].milliseconds(range(3), run.stopwatch)))
    samples: dict[str, dict[str, float]] = {name: {} for name in peers}
    for index in range(ROUNDS):
        if index > 1 and run.is_late():
            run.skip(f"{ROUNDS - index} of {ROUNDS} rounds: no time", workload=workload.name)
            break
        turn = index % len(peers)
        for name in workload.caches[turn:] + workload.caches[:turn]:
            if name != "none" or not workload.is_changing or index % _NONE_EVERY == 0:
                numbers = range(index * size, (index + 1) * size)
                ms = peers[name].milliseconds(numbers, run.stopwatch)
                samples[name][str(index)] = ms
    for name, steps in peers.items():
        counts = None if steps.cache is None else steps.cache.statistics()
        on_device, in_all = (counts.device_bytes, counts.bytes) if counts else (0, 0)
        yield {
            "workload": workload.name,
            "cache": name,
            **Timing([*samples[name].values()]).columns,
            **split(workload, inputs, name, run.stopwatch),
            "gpu_mib": on_device / 2**20,
            "host_mib": (in_all - on_device) / 2**20,
            "hit_rate": counts.hit_rate if counts else 0.0,
            "calls": workload.calls,
            "samples_ms": samples[name],
            "statistics": asdict(counts) if counts else None,
        }


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
