from collections.abc import Sequence
from typing import ClassVar

class PatternWords:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...

class Padding:
    masked: ClassVar[Padding]
    zeros: ClassVar[Padding]
    __members__: ClassVar[dict[str, Padding]]

class Directions:
    forward: ClassVar[Directions]
    transposed: ClassVar[Directions]
    both: ClassVar[Directions]
    __members__: ClassVar[dict[str, Directions]]

class QueryRows:
    all: ClassVar[QueryRows]
    near: ClassVar[QueryRows]
    far: ClassVar[QueryRows]
    __members__: ClassVar[dict[str, QueryRows]]

class Branch:
    segment_length: int
    dilation_rate: int
    head_offsets: list[int]
    def __init__(
        self, segment_length: int, dilation_rate: int, head_offsets: Sequence[int] = ...
    ) -> None: ...

class PatternSpec:
    seq_len: int
    branches: list[Branch]
    heads: int
    kv_heads: int
    is_causal: bool
    padding: Padding
    row_tile: int | None
    directions: Directions
    queries: list[tuple[int, int]]
    keys: list[tuple[int, int]]
    far_keys: list[tuple[int, int]]
    rows: QueryRows
    @property
    def sequences(self) -> list[tuple[int, int]] | None: ...
    @sequences.setter
    def sequences(self, numbers: bytes | None) -> None: ...
    def __init__(
        self,
        *,
        seq_len: int = ...,
        branches: Sequence[Branch] = ...,
        heads: int = ...,
        kv_heads: int = ...,
        is_causal: bool = ...,
        padding: Padding = ...,
        row_tile: int | None = ...,
        directions: Directions = ...,
        queries: Sequence[tuple[int, int]] = ...,
        keys: Sequence[tuple[int, int]] = ...,
        far_keys: Sequence[tuple[int, int]] = ...,
        rows: QueryRows = ...,
        sequences: bytes | None = ...,
    ) -> None: ...

TILES: list[tuple[int, int]]  # rows and columns, the larger one first

def validate(spec: PatternSpec) -> None: ...
def is_whole(spec: PatternSpec) -> bool: ...
def plan(spec: PatternSpec) -> PatternWords: ...
def plan_lengths(spec: PatternSpec, lengths: Sequence[int]) -> list[PatternWords]: ...
def join_sequences(spec: PatternSpec, parts: Sequence[tuple[int, int]]) -> PatternWords: ...
def report(spec: PatternSpec) -> dict[str, int]: ...
def interleaved_offsets(dilation_rate: int, heads: int) -> list[int]: ...
def blocked_offsets(dilation_rate: int, heads: int) -> list[int]: ...
def max_pattern_bytes() -> int: ...
def set_max_pattern_bytes(nbytes: int) -> None: ...
def planned_pattern_counts() -> dict[str, int]: ...
def resize_planned_patterns(max_entries: int, max_bytes: int) -> None: ...
def clear_planned_patterns() -> None: ...
def built_with_cuda() -> bool: ...
def torch_version_built() -> str: ...
def cpu_instruction_set() -> str: ...
