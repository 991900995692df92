"""Texts fed to a cache in steps, and patterns drawn at random, for the tests of decoding."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dilated_attention_pytorch import DilatedKVCache
from tests.conftest import make_qkv
from tests.reference import reference_attention

UNBOUNDED = 2**62


class Case(NamedTuple):
    """A pattern: seq_len positions, heads over kv_heads, branches, and a table of offsets."""

    seq_len: int
    heads: int
    kv_heads: int
    segment_lengths: list[int]
    dilation_rates: list[int]
    table: Tensor
    head_dim: int = 4

    def qkv(self, seed: int, batch: int = 1, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        options = {"batch": batch, "kv_heads": self.kv_heads, "seed": seed, **options}
        return make_qkv(self.seq_len, self.heads, self.head_dim, **options)

    def cache(self, batch: int = 1, **options: Any) -> DilatedKVCache:
        options = {"dtype": torch.float64, "num_heads": self.heads, **options}
        branches = (self.segment_lengths, self.dilation_rates)
        return DilatedKVCache(
            batch, self.kv_heads, self.head_dim, *branches, head_offsets=self.table, **options
        )

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        branches = (self.segment_lengths, self.dilation_rates)
        return reference_attention(q, k, v, *branches, head_offsets=self.table, is_causal=True)


def random_case(seed: int) -> Case:
    """Rates that divide nothing, segments that don't nest or are the whole text, branches that
    repeat, heads in no branch."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 1, 2, 3])
    heads = kv_heads * draw.choice([1, 2, 4])
    seq_len = draw.randint(1, 70)
    lengths, rates = [], []
    for _ in range(draw.randint(1, 4)):
        lengths.append(draw.choice([draw.randint(1, 12), draw.randint(1, 90), UNBOUNDED]))
        rates.append(draw.choice([1, 2, draw.randint(1, 9)]))
    if draw.random() < 0.3:
        lengths.append(lengths[0])
        rates.append(rates[0])
    table = [
        [draw.randint(-1 if draw.random() < 0.3 else 0, r - 1) for _ in range(heads)] for r in rates
    ]
    return Case(seq_len, heads, kv_heads, lengths, rates, torch.tensor(table))


def nested_case(seed: int) -> Case:
    """Segments of which each is made of shorter ones, up to the whole text, longer than what a
    cache that grows begins with."""
    draw = random.Random(seed)
    lengths, rates = [draw.randint(2, 20)], [1]
    for _ in range(draw.randint(1, 3)):
        lengths.append(lengths[-1] * draw.randint(2, 6))
        rates.append(rates[-1] * draw.choice([1, 1, 2]))
    lengths.append(UNBOUNDED)
    rates.append(rates[-1] * draw.choice([1, 2]))
    table = [[draw.randrange(min(w, r))] for w, r in zip(lengths, rates, strict=True)]
    return Case(draw.randint(65, 300), 1, 1, lengths, rates, torch.tensor(table))


def random_chunks(seed: int, seq_len: int) -> list[int]:
    draw, chunks = random.Random(seed), []
    while sum(chunks) < seq_len:
        chunks.append(min(draw.choice([1, 2, draw.randint(0, 30)]), seq_len - sum(chunks)))
    return chunks


def decode(
    cache: DilatedKVCache, q: Tensor, k: Tensor, v: Tensor, chunks: Iterable[int], begin: int = 0
) -> tuple[Tensor, Tensor]:
    """out and lse of the positions from `begin` on, appended and attended chunk by chunk."""
    parts = []
    for chunk in chunks:
        rows = slice(begin, begin := begin + chunk)
        cache.append(k[:, rows], v[:, rows])
        parts.append(cache.attend(q[:, rows], return_lse=True))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def bad_rows(like: Tensor, n: int) -> Tensor:
    """n positions of NaN for each text."""
    return torch.full_like(like[:, :1], torch.nan).repeat(1, n, 1, 1)
