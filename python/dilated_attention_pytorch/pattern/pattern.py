"""A pattern: its specification, and the words that the planner made of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .advice import advise
from .bounds import HEADS_END, SEQ_LEN_END, at_least
from .branch import Branch, Padding, make_branches
from .offsets import Offsets, OffsetTable, normalize_head_offsets, offset_table
from .sequences import Sequences

Directions = Literal["forward", "transposed", "both"]
QueryRows = Literal["all", "near", "far"]


class PatternSpec(NamedTuple):
    """Everything that a pattern depends on; hashable, so it is the key of the caches.

    A wrong field raises a ValueError or TypeError that names it, when the pattern is planned.

    Attributes:
        seq_len: positions.
        branches: from `make_branches`.
        head_offsets: a name, or a table [branches, heads] of tuples.
        heads, kv_heads: of query, and of key and value.
        is_causal, padding: as in `dilated_attention`.
        queries, keys: positions of the rows of query, and of key and value, as stretches (begin,
            end, begin, end, ...) in the sequence's order: in a ring, a shard of it. end = -1 stands
            for seq_len.
        far_keys: the same of more keys, in tensors of their own; of such a pattern there is a
            forward table only.
        rows: "near" leaves out the query rows that meet far keys, "far" the others.
        row_tile: rows that kernels take at once, 64 or 16; None: the planner's choice.
        directions: "both"; "forward" is for the forward pass alone, quicker to plan and smaller
            where kv_heads < heads or queries != keys.
        sequences: those of a batch in seq_len rows, each with positions of its own, from 0. The
            stretches above then count through the batch's rows.
    """

    seq_len: int
    branches: tuple[Branch, ...]
    head_offsets: Offsets | OffsetTable
    heads: int
    kv_heads: int
    is_causal: bool = False
    padding: Padding = "masked"
    queries: tuple[int, ...] = (0, -1)
    keys: tuple[int, ...] = (0, -1)
    row_tile: int | None = None
    directions: Directions = "both"
    sequences: Sequences | None = None
    far_keys: tuple[int, ...] = ()
    rows: QueryRows = "all"

    def parts(self) -> tuple[PatternSpec, ...]:
        """What a batch's pattern is joined of: one sequence of each length, the longest first.

        Nothing of a part of a batch, which is planned as it is.
        """
        if self.sequences is None or not _C.is_whole(self.native()):
            return ()
        lengths = self.sequences.lengths()
        return tuple(self._replace(seq_len=length, sequences=None) for length in lengths)

    def offset_table(self) -> OffsetTable:
        """[branches, heads], -1 where a head is not in a branch."""
        rates = [rate for _, rate in self.branches]
        return offset_table(self.head_offsets, rates, self.heads)

    def native(self) -> _C.PatternSpec:
        """The specification as the planner takes it, which checks the values further."""
        self.check()
        fields = self._asdict() | {
            "branches": _native_branches(self.branches, self.head_offsets, self.heads),
            "padding": _C.Padding.__members__[self.padding],
            "directions": _C.Directions.__members__[self.directions],
            "rows": _C.QueryRows.__members__[self.rows],
            "queries": pairs_of(self.queries),
            "keys": pairs_of(self.keys),
            "far_keys": pairs_of(self.far_keys),
            "sequences": None if self.sequences is None else self.sequences.numbers(),
        }
        del fields["head_offsets"]
        return _C.PatternSpec(**fields)

    def check(self) -> None:
        """Raises TypeError or ValueError for wrong types, names, heads, rates and offsets."""
        at_least(0, self.seq_len, "seq_len", SEQ_LEN_END)
        at_least(1, self.heads, "heads", HEADS_END)
        _check_integer(self.kv_heads, "kv_heads")
        if self.row_tile is not None:
            _check_integer(self.row_tile, "row_tile")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads must be positive and divide heads, {self.heads}, got {self.kv_heads}"
            )
        try:
            hash(self.branches)
            lengths, rates = zip(*self.branches, strict=True)
        except (TypeError, ValueError):
            raise TypeError(
                "branches must be a tuple of (segment length, dilation rate), at least one, "
                f"got {self.branches!r}"
            ) from None
        make_branches(lengths, rates)
        offsets = self.head_offsets
        if (
            not isinstance(offsets, (str, tuple))
            or normalize_head_offsets(offsets, rates) != offsets
        ):
            raise TypeError(
                "head_offsets must be 'interleaved', 'blocked' or a table of tuples, "
                f"got {self.head_offsets!r}"
            )
        if self.is_causal is not True and self.is_causal is not False:
            raise TypeError(f"is_causal must be a bool, got {self.is_causal!r}")
        if self.padding not in ("masked", "zeros"):
            raise ValueError(f"padding must be 'masked' or 'zeros', got {self.padding!r}")
        if self.directions not in _C.Directions.__members__:
            raise ValueError(
                f"directions must be 'forward', 'transposed' or 'both', got {self.directions!r}"
            )
        if self.rows not in _C.QueryRows.__members__:
            raise ValueError(f"rows must be 'all', 'near' or 'far', got {self.rows!r}")
        for name in ("queries", "keys", "far_keys"):
            positions = getattr(self, name)
            if not isinstance(positions, tuple) or len(positions) % 2:
                raise TypeError(
                    f"{name} must be positions (begin, end) or (begin, end, begin, end, ...), "
                    f"got {positions!r}"
                )
            for position in positions:
                _check_integer(position, name)
        _check_sequences(self.sequences)


def pairs_of(positions: Sequence[int]) -> list[tuple[int, int]]:
    """(begin, end) of each stretch."""
    return list(zip(positions[::2], positions[1::2], strict=True))


@lru_cache(maxsize=64)
def _native_branches(
    branches: tuple[Branch, ...], head_offsets: Offsets | OffsetTable, heads: int
) -> list[_C.Branch]:
    """Of checked fields; the lengths of a data set share them."""
    offsets = offset_table(head_offsets, [rate for _, rate in branches], heads)
    return [_C.Branch(*pair, list(row)) for pair, row in zip(branches, offsets, strict=True)]


def check_spec(spec: PatternSpec) -> None:
    """Raises TypeError if it isn't a specification, else what its check() raises."""
    if not isinstance(spec, PatternSpec):
        raise TypeError(f"spec must be a PatternSpec, got {spec!r}")
    spec.check()


def _check_integer(value: int, name: str) -> None:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must be a 64-bit integer, got {number}")


def _check_sequences(sequences: Sequences | None) -> None:
    if sequences is not None and not isinstance(sequences, Sequences):
        raise TypeError(f"sequences must be Sequences or None, got {sequences!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """What the operators take for one specification.

    Attributes:
        spec: what it was planned for.
        words: int32 [words], on the CPU; csrc/include/dilated/pattern_layout.h says what they mean.
        head_offsets: int64 [branches, heads] on the CPU, None for the interleaved ones.
        page_locked: whether the words lie in memory from which GPUs copy asynchronously.
    """

    spec: PatternSpec
    words: Tensor
    head_offsets: Tensor | None
    page_locked: bool = False
    _version: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        offsets = 0 if self.head_offsets is None else self.head_offsets._version
        object.__setattr__(self, "_version", self.words._version + offsets)

    @staticmethod
    def check(spec: PatternSpec) -> None:
        """Raises what `plan` does, except for the pattern's size.

        Fast, as it plans no rows.
        """
        check_spec(spec)
        _C.validate(spec.native())
        longest = next(iter(spec.parts()), spec)  # what is said of a sequence is said of a batch's
        Pattern.plan(longest._replace(queries=(0, 0), keys=(0, 0), far_keys=()))

    @property
    def is_intact(self) -> bool:
        """Whether nobody wrote into the words or the offsets, by torch's count."""
        offsets = self.head_offsets
        if offsets is None:
            return self.words._version == self._version
        return self.words._version + offsets._version == self._version

    @staticmethod
    def plan(spec: PatternSpec) -> Pattern:
        """Plans on the host; warns of specifications that are seldom meant (advice.py).

        Raises:
            TypeError, ValueError: the specification is wrong, or the pattern would be larger than
                `max_pattern_bytes()`.
        """
        check_spec(spec)
        pattern = _plan(spec, _C.plan)
        advise(next(iter(spec.parts()), spec))
        return pattern

    @staticmethod
    def plan_parts(spec: PatternSpec, parts: Sequence[PatternSpec]) -> list[Pattern]:
        """As `plan`, of several of `spec.parts()` at once, the longest first; on several threads.

        Raises:
            TypeError, ValueError: as `plan`.
        """
        check_spec(spec)
        with torch.inference_mode(False):
            planned = _C.plan_lengths(spec.native(), [part.seq_len for part in parts])
            offsets = _offset_tensor(spec)
            words = [torch.frombuffer(buffer, dtype=torch.int32) for buffer in planned]
        for part in parts[:1]:
            advise(part)
        return [Pattern(part, x, offsets) for part, x in zip(parts, words, strict=True)]

    @staticmethod
    def join(spec: PatternSpec, parts: Sequence[Pattern]) -> Pattern:
        """As `plan`, of a batch of sequences whose `spec.parts()` are planned already.

        Raises:
            TypeError, ValueError: as `plan`; parts are not those.
        """
        check_spec(spec)
        words = [(part.words.data_ptr(), part.words.numel()) for part in parts]
        return _plan(spec, lambda native: _C.join_sequences(native, words))

    @property
    def nbytes(self) -> int:
        """Bytes of the words."""
        return self.words.nbytes

    def report(self) -> dict[str, int]:
        """(query, key) pairs over all heads, and the pattern's size.

        Returns:
            A dictionary. Of pairs: "nominal", every branch on its own; "distinct", each pair once;
            "computed", with the empty corners of tiles. Of the pattern: "bytes", "tiles", "groups",
            "runs".
        """
        return _C.report(self.spec.native())


def _plan(spec: PatternSpec, plan: Callable[[_C.PatternSpec], _C.PatternWords]) -> Pattern:
    # A profile shows planning by name; a call costs nothing while there is none.
    profiled = torch._C._autograd._profiler_enabled()
    named = torch.profiler.record_function("dilated::plan") if profiled else nullcontext()
    # An inference tensor could not be saved for a later call's backward.
    with named, torch.inference_mode(False):
        words = torch.frombuffer(plan(spec.native()), dtype=torch.int32)
        return Pattern(spec, words, _offset_tensor(spec))


def _offset_tensor(spec: PatternSpec) -> Tensor | None:
    if spec.head_offsets == "interleaved":
        return None
    return torch.tensor(spec.offset_table(), dtype=torch.int64, device="cpu")
