"""Random patterns and shards, and what a ring has to move by the definition of the pattern."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dilated_attention_pytorch.pattern import PatternSpec, Sequences, make_branches
from dilated_attention_pytorch.ring.plans.lattice import Piece, Span

Row = tuple[int, int]  # position, KV head


def random_spec(generator: random.Random, seq_len: int) -> PatternSpec:
    branches = generator.randint(1, 4)
    lengths = [generator.randint(1, 2 * seq_len + 1) for _ in range(branches)]
    rates = [generator.choice([1, 2, 3, 4, 5, 8, 16]) for _ in range(branches)]
    kv_heads = generator.choice([1, 2, 3])
    heads = kv_heads * generator.choice([1, 2, 4])
    table = tuple(tuple(generator.randint(-1, rate - 1) for _ in range(heads)) for rate in rates)
    return PatternSpec(
        seq_len,
        make_branches(lengths, rates),
        generator.choice(["interleaved", "blocked", table]),
        heads,
        kv_heads,
        generator.random() < 0.5,
    )


def as_a_batch(generator: random.Random, spec: PatternSpec) -> PatternSpec:
    """In every second case, of random sequences in as many rows."""
    if generator.random() < 0.5:
        return spec
    places, begin = [], generator.randint(0, 3)
    while begin < spec.seq_len:
        length = min(generator.choice([0, 1, generator.randint(2, 60)]), spec.seq_len - begin)
        places.append((begin, length))
        begin += length + generator.choice([0, 0, 1, 5])
    return spec._replace(sequences=Sequences(places))


def random_shards(generator: random.Random, seq_len: int, size: int) -> tuple[int, ...]:
    if generator.random() < 0.3 and seq_len % size == 0:
        return (seq_len // size,) * size
    cuts = sorted(generator.randint(0, seq_len) for _ in range(size - 1))
    edges = [0, *cuts, seq_len]
    return tuple(b - a for a, b in zip(edges, edges[1:], strict=False))


def needed_rows(spec: PatternSpec, source: Span, target: Span) -> set[Row]:
    """The (position, KV head) of `source` that some query of `target` attends to."""
    if spec.sequences is not None:
        found = set()
        for first, length in spec.sequences.tensor.tolist():
            inside = (
                (max(begin - first, 0), min(end - first, length)) for begin, end in (source, target)
            )
            one = spec._replace(seq_len=length, sequences=None)
            found |= {(first + p, head) for p, head in needed_rows(one, *inside)}
        return found
    group = spec.heads // spec.kv_heads
    needed = set()
    for branch, offsets in zip(spec.branches, spec.offset_table(), strict=True):
        w, r = min(branch.segment_length, spec.seq_len), branch.dilation_rate
        asked: dict[tuple[int, int], int] = {}  # (segment, offset) -> last query
        for p in range(*target):
            asked[p // w, p % w % r] = p
        for t in range(*source):
            last = asked.get((t // w, t % w % r))
            if last is None or (spec.is_causal and t > last):
                continue
            needed |= {(t, h // group) for h, o in enumerate(offsets) if o == t % w % r}
    return needed


def rows_of(piece: Piece) -> list[Row]:
    return [
        (p, piece.first_head + i)
        for i, residue in enumerate(piece.residues)
        for p in range(piece.begin, piece.end)
        if p % piece.rate == residue
    ]


def is_nested(spec: PatternSpec) -> bool:
    """Whether the rates form a chain of divisors and offsets agree: lattices lie in each other."""
    rates = sorted(branch.dilation_rate for branch in spec.branches)
    chain = all(b % a == 0 for a, b in zip(rates, rates[1:], strict=False))
    return chain and spec.head_offsets == "interleaved"


def equal(size: int, length: int) -> Sequence[int]:
    return (length,) * size
