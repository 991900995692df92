"""Plans through `_C` and reads the words back, following csrc/include/dilated/pattern_layout.h;
numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch import _C

MAGIC = 0x44494C50
HEADER = [
    "magic",
    "words",
    "fingerprint_low",
    "fingerprint_high",
    "seq_len",
    "heads",
    "kv_heads",
    "is_causal",
    "branches",
    "queries",
    "keys",
    "near_keys",
    "reserved",
    "reserved",
    "checksum_low",
    "checksum_high",
]
TABLE = [
    "classes",
    "max_class_heads",
    "spans",
    "tiles",
    "groups",
    "runs",
    "stretches",
    "windows",
    "class_heads_at",
    "span_tiles_at",
    "tiles_at",
    "groups_at",
    "runs_at",
    "shifts_at",
    "windows_at",
    "row_tile",
    "computed_tall",
    "computed_low",
    "reserved",
    "reserved",
]
GROUP = [
    "head_class",
    "rows",
    "columns",
    "row_runs",
    "row_run_count",
    "column_runs",
    "column_run_count",
    "zero_keys",
]
TILE = [
    "group",
    "origin",
    "first_row",
    "rows",
    "row_shift",
    "first_stretch",
    "first_window",
    "sequence",
]
RUN = np.dtype(
    [
        ("start", "i4"),
        ("stride", "i4"),
        ("count", "i4"),
        ("multiplicity", "u1"),
        ("stretch", "u1"),
        ("head", "u2"),
    ]
)
Stretches = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Spec:
    """The planner's arguments; an end of -1 stands for the sequence's end, offsets of None for
    interleaved ones.
    """

    seq_len: int
    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    heads: int = 1
    kv_heads: int | None = None
    offsets: Sequence[Sequence[int]] | None = None
    is_causal: bool = False
    zero_padding: bool = False
    queries: Stretches = ((0, -1),)
    keys: Stretches = ((0, -1),)
    far_keys: Stretches = ()
    rows: str = "all"
    row_tile: int | None = None
    directions: str = "both"

    @property
    def offset_table(self) -> list[list[int]]:
        if self.offsets is not None:
            return [list(row) for row in self.offsets]
        return [[h % r for h in range(self.heads)] for r in self.dilation_rates]

    def positions(self, stretches: Stretches) -> np.ndarray:
        """Of a tensor's rows, int64."""
        ends = [(begin, self.seq_len if end == -1 else end) for begin, end in stretches]
        return np.concatenate([np.arange(*stretch) for stretch in ends])

    def native(self) -> _C.PatternSpec:
        branches = zip(self.segment_lengths, self.dilation_rates, self.offset_table, strict=True)
        return _C.PatternSpec(
            seq_len=self.seq_len,
            branches=[_C.Branch(*branch) for branch in branches],
            heads=self.heads,
            kv_heads=self.heads if self.kv_heads is None else self.kv_heads,
            is_causal=self.is_causal,
            padding=_C.Padding.zeros if self.zero_padding else _C.Padding.masked,
            queries=self.queries,
            keys=self.keys,
            far_keys=self.far_keys,
            rows=_C.QueryRows.__members__[self.rows],
            row_tile=self.row_tile,
            directions=_C.Directions.__members__[self.directions],
        )


def plan_words(spec: Spec) -> np.ndarray:
    """int32 [words]."""
    return np.frombuffer(_C.plan(spec.native()), dtype=np.int32).copy()


def plan_tensor(spec: Spec, device: str = "cpu") -> Tensor:
    return torch.from_numpy(plan_words(spec)).to(device)


def _records(words: np.ndarray, at: int, count: int, names: Sequence[str]) -> dict[str, np.ndarray]:
    block = words[at : at + count * len(names)].reshape(count, len(names)).astype(np.int64)
    return {name: block[:, i] for i, name in enumerate(names)}


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begins[0] .. begins[0] + lengths[0] - 1, then the same for 1, ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(begins - ends + lengths, lengths)


@dataclass
class Pairs:
    """All (row head, row, column head, column) that a table lists; heads as in class_heads and
    Run::head.
    """

    row_head: np.ndarray
    row: np.ndarray
    column_head: np.ndarray
    column: np.ndarray
    multiplicity: np.ndarray


@dataclass
class Table:
    words: np.ndarray
    numbers: dict[str, int]
    class_begin: np.ndarray = field(init=False)
    class_heads: np.ndarray = field(init=False)
    span_tiles: np.ndarray = field(init=False)
    tiles: dict[str, np.ndarray] = field(init=False)
    groups: dict[str, np.ndarray] = field(init=False)
    runs: np.ndarray = field(init=False)
    shifts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        n, words = self.numbers, self.words
        self.class_begin = words[n["class_heads_at"] :][: n["classes"] + 1]
        heads_at = n["class_heads_at"] + n["classes"] + 1
        self.class_heads = words[heads_at:][: int(self.class_begin[-1])]
        self.span_tiles = words[n["span_tiles_at"] :][: n["spans"] + 1]
        self.tiles = _records(words, n["tiles_at"], n["tiles"], TILE)
        self.groups = _records(words, n["groups_at"], n["groups"], GROUP)
        self.runs = words[n["runs_at"] :][: 4 * n["runs"]].view(RUN)
        self.shifts = words[n["shifts_at"] :][: n["stretches"]].astype(np.int64)

    @cached_property
    def run_positions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Relative positions of all runs one after the other, the run each belongs to, and where
        each run begins.
        """
        counts = self.runs["count"].astype(np.int64)
        run = np.repeat(np.arange(len(counts)), counts)
        begins = np.cumsum(counts) - counts
        step = np.arange(len(run)) - begins[run]
        positions = self.runs["start"].astype(np.int64)[run] + step * self.runs["stride"][run]
        return positions, run, np.append(begins, len(run))

    @cached_property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The tile and the position of every row of every tile."""
        positions, _, begins = self.run_positions
        tile = np.repeat(np.arange(len(self.tiles["rows"])), self.tiles["rows"])
        first = begins[self.groups["row_runs"][self.tiles["group"]]] + self.tiles["first_row"]
        return tile, positions[_ranges(first, self.tiles["rows"])] + self.tiles["origin"][tile]

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tile, the position and the run of every column of every tile."""
        positions, run, begins = self.run_positions
        lengths = self.groups["columns"][self.tiles["group"]]
        tile = np.repeat(np.arange(len(lengths)), lengths)
        at = _ranges(begins[self.groups["column_runs"][self.tiles["group"]]], lengths)
        return tile, positions[at] + self.tiles["origin"][tile], run[at]

    @cached_property
    def row_places(self) -> np.ndarray:
        """Where the rows of `rows` lie in their tensor."""
        tile, position = self.rows
        return position + self.tiles["row_shift"][tile]

    @cached_property
    def column_places(self) -> np.ndarray:
        """Where the columns of `columns` lie in their tensor."""
        tile, position, run = self.columns
        stretch = self.tiles["first_stretch"][tile] + self.runs["stretch"][run]
        return position + self.shifts[stretch]

    @cached_property
    def tile_class(self) -> np.ndarray:
        return self.groups["head_class"][self.tiles["group"]]

    def row_heads(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row head, row position, tile) for every row of every head."""
        tile, row = self.rows
        heads = np.diff(self.class_begin)[self.tile_class[tile]]
        at = np.repeat(np.arange(len(tile)), heads)
        head = self.class_heads[_ranges(self.class_begin[self.tile_class[tile]], heads)]
        return head, row[at], tile[at]

    def pairs(self) -> Pairs:
        head, row, tile = self.row_heads()
        _, column, run = self.columns
        lengths = self.groups["columns"][self.tiles["group"]]
        begins = np.cumsum(lengths) - lengths
        at = np.repeat(np.arange(len(tile)), lengths[tile])
        columns = _ranges(begins[tile], lengths[tile])
        runs = self.runs[run[columns]]
        return Pairs(head[at], row[at], runs["head"], column[columns], runs["multiplicity"])


@dataclass
class Plan:
    words: np.ndarray

    @cached_property
    def header(self) -> dict[str, int]:
        return dict(zip(HEADER, self.words.tolist(), strict=False))

    def header_table(self, index: int) -> dict[str, int]:
        """Of the forward table or, 1, the transposed one; all zeros where there is none."""
        at = len(HEADER) + index * len(TABLE)
        return dict(zip(TABLE, self.words[at:].tolist(), strict=False))

    def _table(self, index: int) -> Table:
        return Table(self.words, self.header_table(index))

    @cached_property
    def forward(self) -> Table:
        return self._table(0)

    @cached_property
    def transposed(self) -> Table:
        return self._table(1)


def plan(spec: Spec) -> Plan:
    return Plan(plan_words(spec))


def seal(words: np.ndarray, fingerprint_of: np.ndarray | None = None) -> np.ndarray:
    """The words with the sum that they must have; with another pattern's fingerprint, if given."""
    words = words.copy()
    at = {name: i for i, name in enumerate(HEADER)}
    words[at["words"]] = len(words)
    if fingerprint_of is not None:
        words[2:4] = fingerprint_of[2:4]
    words[at["checksum_low"] : at["checksum_high"] + 1] = 0
    total = 0
    for unit, (first, second) in enumerate(words.view(np.uint64).reshape(-1, 2).tolist()):
        first ^= (unit + 1) * 0x9E3779B97F4A7C15 % 2**64
        product = first * (second ^ 0xE7037ED1A0B428DB)
        total += (product ^ product >> 64) % 2**64
    words[at["checksum_low"] : at["checksum_high"] + 1].view(np.uint64)[0] = total % 2**64
    return words


def with_windows(
    words: np.ndarray, forward: tuple[int, int], transposed: tuple[int, int]
) -> np.ndarray:
    """The pattern, not sealed, in which a row at position p sees only columns p + first .. p + last
    of its list, given (first, last) for each table.
    """
    plan = Plan(words)
    parts = [words.copy()]
    for index, (table, offsets) in enumerate(
        [(plan.forward, forward), (plan.transposed, transposed)]
    ):
        table_at = len(HEADER) + index * len(TABLE)
        tiles_at, rows = table.numbers["tiles_at"], table.tiles["rows"]
        tiles = parts[0][tiles_at : tiles_at + len(rows) * len(TILE)].reshape(-1, len(TILE))
        tiles[:, TILE.index("first_window")] = np.cumsum(rows) - rows
        windows = (table.rows[1][:, None] + np.array(offsets)).astype(np.int32)
        parts[0][table_at + TABLE.index("windows")] = len(windows)
        parts[0][table_at + TABLE.index("windows_at")] = sum(map(len, parts))
        parts.append(np.resize(windows.ravel(), -(-windows.size // 4) * 4))
    return np.concatenate(parts)
