"""The named workloads, and what each costs at least: operations, bytes and the floors they give."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any, Literal, cast, get_args

import torch

from dilated_attention_pytorch import _C
from dilated_attention_pytorch.pattern import Branch, Padding, PatternSpec, Sequences, make_branches

Pass = Literal["fwd", "bwd", "fwd+bwd", "host"]
PASSES: tuple[Pass, ...] = get_args(Pass)
BOTH: tuple[Pass, ...] = ("fwd", "fwd+bwd")
_RATES = (1, 2, 4, 8, 16)
_LONGNET = ((2048, 4096, 8192, 16384, 32768), _RATES)
_GIGAPATH = ((1024, 5792, 32768, 185363, 1048576), _RATES)
_LONGVIT = ((1024, 2048, 4096, 8192, 16384), _RATES)
_SEED = ((512, 1024), (1, 2))
_WHOLE = (2048, 8192, 32768, 131072, 262144)  # one segment spans all ranks of a ring
_MILLION = (2048, 8192, 65536, 262144, 1048576)

BACKWARD_FLOPS = 2.5  # products of the backward over those of the forward: five against two
_FACTOR = {"fwd": 1.0, "bwd": BACKWARD_FLOPS, "fwd+bwd": 1.0 + BACKWARD_FLOPS, "host": 0.0}


@dataclass(frozen=True, slots=True)
class Workload:
    """One call of dilated attention on [batch, seq_len, heads, head_dim].

    `lengths`: of a batch of sequences, packed one behind the other in seq_len rows; batch is 1.
    `causal` lists the variants that are measured. `head_offsets` is "blocked" unless the name says
    otherwise: torchscale's rule, so that all implementations compute the same thing.
    """

    name: str
    group: str
    seq_len: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    batch: int = 1
    kv_heads: int = 0  # 0: as many as heads
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    head_offsets: Literal["interleaved", "blocked"] = "blocked"
    padding: Padding = "masked"
    causal: tuple[bool, ...] = (False, True)
    lengths: tuple[int, ...] = ()

    @property
    def branches(self) -> tuple[Branch, ...]:
        return make_branches(self.segment_lengths, self.dilation_rates)

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `dilated_attention`."""
        names = ("segment_lengths", "dilation_rates", "head_offsets", "padding")
        return {name: getattr(self, name) for name in names}

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.seq_len, self.heads, self.head_dim)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.seq_len, self.key_heads, self.head_dim)

    def title(self, causal: bool) -> str:
        return f"{self.name}, causal" if causal else self.name

    def spec(self, causal: bool) -> PatternSpec:
        """The library's specification of the pattern."""
        heads = (self.heads, self.key_heads)
        shape = (self.seq_len, self.branches, self.head_offsets, *heads)
        return PatternSpec(*shape, causal, self.padding, sequences=self.sequences)

    @property
    def stretches(self) -> tuple[tuple[int, int], ...]:
        """(begin, end) of the rows of each sequence of a batch."""
        ends = tuple(accumulate(self.lengths))
        return tuple(zip((0, *ends), ends, strict=False))

    @property
    def sequences(self) -> Sequences | None:
        rows = [(begin, end - begin) for begin, end in self.stretches]
        return Sequences(rows) if rows else None


def _build() -> Iterable[Workload]:
    one_way: dict[str, Any] = {"causal": (False,)}
    longnet = Workload("longnet-128k", "anchors", 131072, 12, 64, *_LONGNET)
    llm = Workload("llm-128k", "anchors", 131072, 32, 128, *_LONGNET)
    # "zeros" is what torchscale computes where the length is not a multiple of a segment.
    gigapath = Workload(
        "gigapath-10k", "anchors", 10001, 16, 48, *_GIGAPATH, padding="zeros", **one_way
    )
    yield longnet
    yield llm
    yield replace(longnet, name="longnet-32k", seq_len=32768)
    yield gigapath
    yield replace(gigapath, name="gigapath-65k", seq_len=65001)
    half: dict[str, Any] = {"dtype": "float16", **one_way}
    for seq_len, batch in ((1024, 4), (4096, 2), (16384, 1)):
        yield Workload(f"seed-{seq_len}", "seed", seq_len, 8, 64, *_SEED, batch=batch, **half)
    paper: dict[str, Any] = {"group": "interleaved", "head_offsets": "interleaved"}
    for base in (longnet, llm):
        yield replace(base, name=f"{base.name}-interleaved", **paper)
    yield replace(llm, name="llm-128k-gqa", group="gqa", kv_heads=8)
    yield replace(gigapath, name="gigapath-demo", group="presets", seq_len=1069)
    yield Workload("longvit-s", "presets", 16384, 16, 24, *_LONGVIT, **half)
    # Shapes in which nothing divides anything, where only the library computes all rows.
    yield Workload("edge-ragged", "edge", 16411, 12, 64, *_LONGNET)
    yield Workload("edge-heads", "edge", 16384, 6, 64, (1024, 4096), (4, 8))
    yield Workload("edge-short-segment", "edge", 16384, 8, 64, (4, 4096), (8, 2))
    yield Workload("edge-short-sequence", "edge", 5, 8, 64, (4, 16), (1, 8))
    for kilo in (8, 16, 32, 64, 128, 256, 512, 1024):
        scaled = replace(longnet, group="scale-N", **one_way)
        yield replace(scaled, name=f"scale-{kilo}k", seq_len=kilo * 1024)
    whole: dict[str, Any] = {"seq_len": 262144, "segment_lengths": _WHOLE}
    yield replace(llm, name="llm-256k-whole", group="ring", **whole)
    million: dict[str, Any] = {"seq_len": 1048576, "segment_lengths": _MILLION}
    yield replace(longnet, name="longnet-1m", group="ring", **million)
    exact: dict[str, Any] = {"dtype": "float32", "head_offsets": "interleaved"}
    for kilo in (4, 16):
        yield Workload(f"cpu-{kilo}k", "cpu", kilo * 1024, 4, 64, (1024, 4096), (1, 4), **exact)
    slides = replace(gigapath, name="slides-200k", group="batches")
    yield _packed(slides, _slides_of_a_batch())
    packed = Workload("packed-64x1k", "batches", 0, 12, 64, (256, 512, 1024), (1, 2, 4))
    yield _packed(replace(packed, causal=(True,)), (1024,) * 64)
    short = replace(packed, name="packed-short", causal=(True,))
    yield _packed(short, _few_positions())
    few = Workload("cpu-packed", "cpu-batches", 0, 4, 32, (64, 256), (1, 4), **exact)
    yield _packed(few, (300, 5, 77, 120, 12, 40))


def _packed(workload: Workload, lengths: tuple[int, ...]) -> Workload:
    return replace(workload, seq_len=sum(lengths), lengths=lengths)


def _slides_of_a_batch() -> tuple[int, ...]:
    """32 numbers of tiles, log-normal, of 500 to 20,000, about 200,000 together."""
    rng = random.Random(0)
    return tuple(
        min(20_000, max(500, round(5_000 * rng.lognormvariate(0.0, 0.8)))) for _ in range(32)
    )


def _few_positions() -> tuple[int, ...]:
    """4,000 lengths of 5 to 60."""
    rng = random.Random(0)
    return tuple(rng.randint(5, 60) for _ in range(4000))


WORKLOADS = {workload.name: workload for workload in _build()}  # most important first
GROUPS = tuple(dict.fromkeys(workload.group for workload in WORKLOADS.values()))


@dataclass(frozen=True, slots=True)
class CacheWorkload:
    """What caches of patterns are compared on: steps at one length, or each at a new one.

    A step is one call, or where lengths change, those of the twelve layers of GigaPath's encoder.
    """

    base: Workload
    lengths: tuple[int, ...]

    @property
    def is_changing(self) -> bool:
        return len(self.lengths) > 1

    @property
    def calls(self) -> int:
        return 12 if self.is_changing else 1

    def spec(self, step: int) -> PatternSpec:
        seq_len = self.lengths[step % len(self.lengths)]
        return self.base.spec(False)._replace(seq_len=seq_len)


CACHE_WORKLOADS = ("seed-1024", "seed-4096", "seed-16384", "longnet-128k", "slides")


def slide_lengths(count: int) -> tuple[int, ...]:
    """Distinct numbers of tiles, log-normal about 6,000, of 500 to 70,000, in random order."""
    rng, found = random.Random(0), dict[int, None]()
    while len(found) < count:
        length = round(6_000 * rng.lognormvariate(0.0, 1.1))
        if 500 <= length <= 70_000:
            found[length] = None
    return tuple(found)


def cache_workloads(slides: int) -> list[CacheWorkload]:
    """Those of CACHE_WORKLOADS; the last one's lengths are `slides` many."""
    fixed = [WORKLOADS[name] for name in CACHE_WORKLOADS[:-1]]
    lengths = slide_lengths(slides)
    base = replace(WORKLOADS["gigapath-10k"], name="slides", seq_len=max(lengths))
    return [*(CacheWorkload(w, (w.seq_len,)) for w in fixed), CacheWorkload(base, lengths)]


def select(wanted: Collection[str]) -> list[Workload]:
    """Workloads by name or by group, in the table's order."""
    return [w for w in WORKLOADS.values() if w.name in wanted or w.group in wanted]


def nominal_flops(workload: Workload, causal: bool, pass_: Pass) -> float:
    """Operations if each branch is computed by itself: sum of 4 D H (N / r) (min(w, N) / r).

    A causal pattern counts half, the backward 2.5 times the forward; sequences add up.
    """
    lengths, branches = workload.lengths or (workload.seq_len,), workload.branches
    pairs_of_a_head = sum(n / r * (min(w, n) / r) for n in lengths for w, r in branches)
    forward = 4 * workload.head_dim * pairs_of_a_head * workload.batch * workload.heads
    return forward * (0.5 if causal else 1.0) * _FACTOR[pass_]


@cache
def pairs(workload: Workload, causal: bool) -> dict[str, int]:
    """The planner's counts of (query, key) pairs over all heads, of one batch element.

    nominal: every branch on its own; distinct: each pair once; computed: with the tiles' corners.
    """
    return _C.report(workload.spec(causal).native())


def distinct_flops(workload: Workload, causal: bool, pass_: Pass) -> float:
    """Operations if each pair of positions is computed once, however many branches hold it."""
    forward = 4.0 * workload.head_dim * pairs(workload, causal)["distinct"] * workload.batch
    return forward * _FACTOR[pass_]


def moved_bytes(workload: Workload, pass_: Pass) -> int:
    """Each input read once and each output written once; lse is float32."""
    batch, seq_len, heads, head_dim = workload.query_shape
    row = batch * seq_len * head_dim * workload.torch_dtype.itemsize
    query, key, lse = row * heads, row * workload.key_heads, batch * seq_len * heads * 4
    forward = 2 * query + 2 * key + lse  # reads q, k, v; writes out, lse
    backward = 4 * query + 4 * key + lse  # reads q, k, v, out, grad_out, lse; writes dq, dk, dv
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward, "host": 0}[pass_]


def floors(
    workload: Workload, causal: bool, pass_: Pass, ceilings: Mapping[str, float]
) -> tuple[float, float]:
    """Milliseconds that no implementation gets under: by its products, and by its bytes.

    ceilings: what the device reaches in a large matrix product, and in a copy.
    """
    return (
        distinct_flops(workload, causal, pass_) / ceilings["matmul_tflops"] * 1e-9,
        moved_bytes(workload, pass_) / ceilings["copy_gbps"] * 1e-6,
    )
