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


def measure(run: Run, options: argparse.Namespace) -> None:
    chosen = {name: getattr(options, name) for name in ("rounds", "slides", "round_ms")}
    workloads = cache_workloads(options.slides)
    hits = list(_measure_hits(workloads[0], run.stopwatch))
    run.document |= {"protocol": chosen, "hits": hits, "options": []}
    for workload in workloads:
        if workload.name in options.workloads:
            rows = list(_measure_rounds(run, options, workload))
            run.rows.extend(rows)
            times = ", ".join(f"{row['cache']} {row['ms']:.4g}" for row in rows)
            run.say(f"{workload.name}: {times} ms a step")
            run.write()
    for entry in _measure_options(run, workloads[-1], options):
        off, on = (percentile(entry[name], 50) for name in ("off_ms", "on_ms"))
        run.say(f"{entry['option']}: {off:.4g} ms without, {on:.4g} with")
        run.document["options"].append(entry)


def _measure_rounds(
    run: Run, options: argparse.Namespace, workload: CacheWorkload
) -> Iterator[Row]:
    """All caches on one workload, in turn; changing lengths are dealt out, fixed ones repeated."""
    inputs = Inputs.make(workload.base, run.device)
    peers = {name: Steps(workload, inputs, name) for name in workload.caches}
    for steps in peers.values():  # compiles, allocates, fills the caches
        for _ in range(WARM_STEPS):
            steps.run(0)
    if workload.is_changing:
        size = max(1, len(workload.lengths) // options.rounds)
        for steps in peers.values():
            if steps.cache is not None:
                steps.cache.drain()
                steps.cache.clear()
    else:
        estimate = peers["v2"].milliseconds(range(3), run.stopwatch)
        size = max(1, round(options.round_ms / estimate))
    samples: dict[str, dict[str, float]] = {name: {} for name in peers}
    for index in range(options.rounds):
        if index > 1 and run.is_late():
            reason = f"{options.rounds - index} of {options.rounds} rounds: no time"
            run.skip(reason, workload=workload.name)
            break
        turn = index % len(peers)
        for name in workload.caches[turn:] + workload.caches[:turn]:
            if name != "none" or not workload.is_changing or index % _NONE_EVERY == 0:
                numbers = range(index * size, (index + 1) * size)
                ms = peers[name].milliseconds(numbers, run.stopwatch)
                samples[name][str(index)] = ms
    for name, steps in peers.items():
        yield _row(steps, samples[name], run.stopwatch)


def _row(steps: Steps, samples: dict[str, float], stopwatch: Stopwatch) -> Row:
    workload = steps.workload
    counts = None if steps.cache is None else steps.cache.statistics()
    on_device, in_all = (counts.device_bytes, counts.bytes) if counts else (0, 0)
    numbers = range(min(_SPLIT_STEPS, len(workload.lengths)) if workload.is_changing else 50)
    renewed = Steps(workload, steps.inputs, steps.name)
    warm = 0 if workload.is_changing else WARM_STEPS
    return {
        "workload": workload.name,
        "cache": steps.name,
        **summarize(list(samples.values()), len(samples)).columns,
        **split(renewed, numbers, warm, stopwatch),
        "gpu_mib": on_device / 2**20,
        "host_mib": (in_all - on_device) / 2**20,
        "hit_rate": counts.hit_rate if counts else 0.0,
        "calls": workload.calls,
        "samples_ms": samples,
        "statistics": asdict(counts) if counts else None,
    }


def _measure_hits(workload: CacheWorkload, stopwatch: Stopwatch) -> Iterator[Row]:
    """The host's time for a look-up that finds its words there, the key's making included."""
    spec, device = workload.spec(0), stopwatch.device
    for name in ("v2", "v3"):
        cache = make_cache(name)
        assert cache is not None
        for _ in range(WARM_STEPS):
            cache.lookup(spec, device)

        def look_up(cache: BasePatternCache = cache) -> None:
            for _ in range(_HITS):
                cache.lookup(PatternSpec(*spec), device)

        times = [stopwatch.host_ms(look_up) * 1e3 / _HITS for _ in range(7)]
        is_hot = not isinstance(cache, TieredPatternCache) or cache.statistics().hot_hits > 0
        yield {"cache": name, "us": min(times), "us_median": percentile(times, 50), "hot": is_hot}


def _measure_options(run: Run, slides: CacheWorkload, options: argparse.Namespace) -> Iterator[Row]:
    """Each option of V2 on and off in turn, after one measurement of each that does not count."""
    device = run.device
    shortest = sorted(slides.spec(step) for step in range(len(slides.lengths)))[:32]
    large = shortest[0]._replace(seq_len=options.large)
    busy = torch.randn(2048, 2048, device=device) if device.type == "cuda" else None

    def announced(cache: PatternCache) -> float:
        cache.prefetch(shortest, _CPU)
        return run.stopwatch.wall_ms(lambda: cache.prefetch(shortest, device))

    def behind_work(cache: PatternCache) -> float:
        cache.prefetch([large], _CPU)

        def use() -> None:
            if busy is not None:
                for _ in range(100):
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
        for index in range(max(2, options.rounds // 2) + 1):
            for is_on in (False, True) if index % 2 else (True, False):
                samples[is_on].append(once(PatternCache(**{name: is_on})))
        settings = {"setting": {name: True}, "absence": {name: False}, "where": where}
        times = {"off_ms": samples[False][1:], "on_ms": samples[True][1:]}
        yield {"option": option, **settings, **times}
