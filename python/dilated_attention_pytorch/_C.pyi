from collections.abc import Sequence

class PatternWords:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __len__(self) -> int: ...

def plan(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: Sequence[int],
    heads: int,
    kv_heads: int,
    is_causal: bool,
    zero_padding: bool,
    query_begin: int,
    query_end: int,
    key_begin: int,
    key_end: int,
    row_tile: int,
) -> PatternWords: ...
def report(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: Sequence[int],
    heads: int,
    kv_heads: int,
    is_causal: bool,
    zero_padding: bool,
    query_begin: int,
    query_end: int,
    key_begin: int,
    key_end: int,
    row_tile: int,
) -> dict[str, int]: ...
def interleaved_offsets(dilation_rates: Sequence[int], heads: int) -> list[int]: ...
def blocked_offsets(dilation_rates: Sequence[int], heads: int) -> list[int]: ...
def max_pattern_bytes() -> int: ...
def set_max_pattern_bytes(nbytes: int) -> None: ...
def planned_pattern_counts() -> dict[str, int]: ...
def resize_planned_patterns(max_entries: int, max_bytes: int) -> None: ...
def clear_planned_patterns() -> None: ...
def built_with_cuda() -> bool: ...
def torch_version_built() -> str: ...
