"""A step of decoding: from the cache that forgets, and over a full cache, ours and torch's.

    python -m benchmarks.bench decode

One position is appended to each text and attended, by the replay of a CUDA graph, the host being
ahead. "window" is the mean over positions of the longest segments' last one, "last" its last few,
where a query meets the most. Replays take turns among as many caches as the L2 cache can't hold.
`rows` are those that a step must read, each once, of a key and a value: of the texts, KV heads and
lattices that some query head takes; `gbps` is their bytes by the time.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dilated_attention_pytorch import DilatedKVCache, dilated_attention_with_kvcache
from dilated_attention_pytorch.pattern import HeadOffsets, Scheme

from .ops import measure_ceilings
from .results import Document, Row, Run
from .tables import Line, table
from .timing import Launch, Timing, captured, rotation

ON_CPU = (
    "that the program runs; a step there is the host's loop over rows, and SDPA reads them all."
)
BUDGET_SECONDS = 60.0
BATCHES = (1, 32)
POSITIONS = 64  # of a window
_COLD_BYTES = 2**28  # that caches in turn have together, at least
_REPEATS = 24  # of a position


@dataclass(frozen=True)
class Shape:
    """Heads over KV heads, and the branches of texts of seq_len positions."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    seq_len: int = 131072

    def offsets(self) -> Iterator[tuple[str, HeadOffsets]]:
        group = self.heads // self.kv_heads
        shared = [[h // group % r for h in range(self.heads)] for r in self.dilation_rates]
        yield "interleaved", "interleaved"
        yield "shared by a group", shared

    def window(self) -> list[int]:
        """POSITIONS of the last window, evenly spread but for their residues, which vary."""
        size = max(self.segment_lengths)
        step = size // POSITIONS
        return [self.seq_len - size + i * step + 37 * i % step for i in range(POSITIONS)]

    def distinct_rows(self, head_offsets: HeadOffsets, position: int) -> int:
        """That some query head meets at a position, over all KV heads."""
        branches = (self.segment_lengths, self.dilation_rates)
        offsets = Scheme.make(*branches, head_offsets, "masked").offset_table(self.heads)
        rows = 0
        for kv_head in range(self.kv_heads):
            group = self.heads // self.kv_heads
            heads = range(kv_head * group, (kv_head + 1) * group)
            met: set[int] = set()
            for w, r, of_head in zip(*branches, offsets, strict=True):
                begin = position // w * w
                if any(of_head[head] == (position - begin) % r for head in heads):
                    met.update(range(position, begin - 1, -r))
            rows += len(met)
        return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(shape=Shape())


def measure(run: Run, options: argparse.Namespace) -> None:
    shape: Shape = options.shape
    run.document["ceilings"] = measure_ceilings(run.stopwatch)
    run.document["shape"] = vars(shape)
    for batch in BATCHES:
        for name, head_offsets in shape.offsets():
            _measure_ours(run, shape, batch, name, head_offsets)
        _measure_full(run, shape, batch)


def _measure_ours(run: Run, shape: Shape, batch: int, name: str, head_offsets: HeadOffsets) -> None:
    run.check_time()
    dtype = _dtype(run)
    branches = (shape.segment_lengths, shape.dilation_rates)
    query, key, value = _step(run, shape, batch)

    def make() -> DilatedKVCache:
        options: dict[str, Any] = {"num_heads": shape.heads, "head_offsets": head_offsets}
        size = (batch, shape.kv_heads, shape.head_dim)
        made = DilatedKVCache(*size, *branches, dtype=dtype, device=run.device, **options)
        made._rows.key.normal_()
        made._rows.value.normal_()
        return made

    def step_of(cache: DilatedKVCache) -> Launch:
        def step() -> None:
            cache.append(key, value)
            cache.attend(query)

        return captured(step, run.device)

    caches = [make()]
    caches += [make() for _ in range(_more(run, caches[0].nbytes))]
    replay = rotation([step_of(cache) for cache in caches])
    replay()
    steps = ceil(_REPEATS / len(caches))  # of a cache
    places = {"window": shape.window(), "last": [shape.seq_len - steps]}
    for where, positions in places.items():
        values = []
        for position in positions:
            for cache in caches:
                cache._set_lengths([position] * batch)
            values.append(_step_ms(run, replay))
        met = (p + i // len(caches) for p in positions for i in range(_REPEATS))
        rows = fmean(shape.distinct_rows(head_offsets, p) for p in met) * batch
        what = {"impl": "forgets", "offsets": name, "where": where, "batch": batch}
        _add(run, shape, what, values, rows, caches[0].nbytes)


def _measure_full(run: Run, shape: Shape, batch: int) -> None:
    """Of caches that hold all positions: the last step, ours and torch's."""
    run.check_time()
    size = (batch, shape.kv_heads, shape.seq_len, shape.head_dim)
    keys, values = (torch.randn(size, dtype=_dtype(run), device=run.device) for _ in "kv")
    query, key, value = _step(run, shape, batch)
    lengths = torch.full((batch,), shape.seq_len - 1, device=run.device)
    caches = (keys.transpose(1, 2), values.transpose(1, 2))

    def ours() -> Tensor:
        return dilated_attention_with_kvcache(
            query,
            *caches,
            lengths,
            shape.segment_lengths,
            shape.dilation_rates,
            key=key,
            value=value,
        )

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, enable_gqa=shape.heads > shape.kv_heads
        )

    nbytes = keys.nbytes + values.nbytes
    all_rows = batch * shape.kv_heads * shape.seq_len
    met = batch * shape.distinct_rows("interleaved", shape.seq_len - 1)
    for impl, call, rows in (("full", ours, met), ("sdpa", dense, all_rows)):
        replay = captured(call, run.device)
        replay()
        taken = [_step_ms(run, replay) for _ in range(5)]
        what = {"impl": impl, "offsets": "interleaved", "where": "last", "batch": batch}
        _add(run, shape, what, taken, rows, nbytes)


def _step_ms(run: Run, replay: Launch) -> float:
    run.stopwatch.flush()  # which the host uses to get ahead
    return run.stopwatch.ms(replay, _REPEATS) / _REPEATS


def _add(
    run: Run, shape: Shape, what: Row, values: Sequence[float], rows: float, nbytes: int
) -> None:
    timing = Timing(list(values), _REPEATS * len(values))
    item = 2 * shape.head_dim * _dtype(run).itemsize
    ms = fmean(values)
    row = {"workload": "decode", **what, **timing.columns, "ms": ms, "launches": timing.launches}
    row |= {"rows": rows, "gbps": rows * item / ms * 1e-6, "cache_mib": nbytes / 2**20}
    run.rows.append(row)
    share = 100 * row["gbps"] / run.document["ceilings"]["copy_gbps"]
    run.say(f"{_name(row)}, batch {row['batch']}: {1e3 * ms:.1f} us, {share:.0f} % of a copy")
    run.write()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()


def _dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.device.type == "cuda" else torch.float32


def _step(run: Run, shape: Shape, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    options: dict[str, Any] = {"dtype": _dtype(run), "device": run.device}
    query, key, value = (torch.randn(batch, 1, n, shape.head_dim, **options) for n in heads)
    return query, key, value


def _more(run: Run, nbytes: int) -> int:
    return _COLD_BYTES // nbytes if run.device.type == "cuda" else 0


_NAMES: dict[str, Callable[[Row], str]] = {
    "forgets": lambda row: f"forgets, offsets {row['offsets']}, {row['where']}",
    "full": lambda row: "full cache, last",
    "sdpa": lambda row: "dense attention over a full cache (SDPA), last",
}


def _name(row: Row) -> str:
    return _NAMES[row["impl"]](row)


def decode_section(documents: Sequence[Document]) -> str:
    """Of the newest run."""
    document = documents[-1]
    copy, shape = document["ceilings"]["copy_gbps"], document["shape"]
    lines: list[Line] = [
        {
            "batch": str(row["batch"]),
            "cache": _name(row),
            "a step": f"{1e3 * row['ms']:.1f} us",
            "rows it must read": f"{row['rows']:,.0f}",
            "of a copy's rate": f"{100 * row['gbps'] / copy:.0f} %",
            "memory": f"{row['cache_mib']:,.0f} MiB",
        }
        for row in document["rows"]
    ]
    heads = f"{shape['heads']} heads of {shape['head_dim']} over {shape['kv_heads']} KV heads"
    lead = (
        f"{document['device']}, commit {document['commit'][:8]}: {heads}, segments of "
        f"{shape['segment_lengths'][0]:,} to {shape['segment_lengths'][-1]:,} at rates of "
        f"{shape['dilation_rates'][0]} to {shape['dilation_rates'][-1]}, texts of "
        f"{shape['seq_len']:,} positions, by the replay of a CUDA graph."
    )
    return f"{lead}\n\n{table(lines)}"
