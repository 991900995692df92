"""A cache of keys and values that keeps only what some later query can meet."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..functional import attend, check_scale
from ..pattern import HeadOffsets, Scheme
from ..pattern.bounds import HEADS_END, SEQ_LEN_END, at_least
from .appended import Appended, Run
from .arguments import check_dtype, check_rows, integers
from .attend_rows import attend_rows
from .layout import branch_layouts, pieces
from .rows import BranchRows
from .state import read_state, write_state

_PIECE = 256  # positions that are scored at once, which bounds the memory of the scores


class DilatedKVCache:
    """Keys and values of a text that grows, and the attention of its last positions to it.

    `append` some positions, then `attend` from them: the numbers are those of one causal
    `dilated_attention` over the whole text. Of each branch only the rows of the segment that is
    being written are kept, ceil(w / r) of a KV head, so memory and time of a step don't grow with
    the text. Gives no gradients.

    Args:
        batch_size: texts, of different lengths if need be.
        num_kv_heads, head_dim: of key and value.
        segment_lengths, dilation_rates, head_offsets: as in `dilated_attention`. Segments of
            2^31 - 1 or more are the whole text, whatever its length.
        num_heads: query heads, a multiple of num_kv_heads, its default. A KV head keeps the rows
            of all offsets that its query heads have.
        max_seq_len: the longest text, which bounds segments longer than it. Without it, buffers of
            segments that are the whole text grow with it, by doubling.
        dtype, device: of key, value and query; torch's defaults if None.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        num_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        max_seq_len: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        self.batch_size = at_least(1, batch_size, "batch_size")
        self.num_kv_heads = at_least(1, num_kv_heads, "num_kv_heads", HEADS_END)
        self.head_dim = at_least(1, head_dim, "head_dim", 257)
        num_heads = num_kv_heads if num_heads is None else num_heads
        self.num_heads = at_least(1, num_heads, "num_heads", HEADS_END)
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads must divide num_heads, {num_heads}, got {self.num_kv_heads}"
            )
        self.scheme = Scheme.make(segment_lengths, dilation_rates, head_offsets, "masked")
        self.max_seq_len = max_seq_len
        if max_seq_len is not None:
            self.max_seq_len = at_least(1, max_seq_len, "max_seq_len", SEQ_LEN_END)
        self._like = torch.empty(self.head_dim, dtype=dtype, device=device)
        check_dtype(self.dtype)
        shape = (self.batch_size, self.head_dim, self.max_seq_len, self.dtype, self.device)
        self._layouts = branch_layouts(self.scheme, self.num_heads, self.num_kv_heads)
        self._branches = [BranchRows(layout, *shape) for layout in self._layouts]
        self._stored = [0] * self.batch_size  # positions before those of the last append
        self._appended: Appended | None = None

    @classmethod
    def from_prefill(
        cls,
        key: Tensor,
        value: Tensor,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        num_heads: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        max_seq_len: int | None = None,
        seq_lens: Sequence[int] | Tensor | None = None,
    ) -> DilatedKVCache:
        """A cache after key and value [batch, seq_len, kv_heads, head_dim], which one ordinary
        causal call has attended. seq_lens: as in `append`."""
        if not isinstance(key, Tensor) or key.dim() != 4:
            given = tuple(key.shape) if isinstance(key, Tensor) else type(key).__name__
            raise ValueError(f"key must be [batch, seq_len, kv_heads, head_dim], got {given}")
        batch_size, _, num_kv_heads, head_dim = key.shape
        cache = cls(
            batch_size,
            num_kv_heads,
            head_dim,
            segment_lengths,
            dilation_rates,
            num_heads=num_heads,
            head_offsets=head_offsets,
            max_seq_len=max_seq_len,
            dtype=key.dtype,
            device=key.device,
        )
        cache._appended = cache._checked(key, value, seq_lens)
        cache._store_appended()
        return cache

    @property
    def dtype(self) -> torch.dtype:
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        return self._like.device

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions appended to each text of the batch."""
        if self._appended is None:
            return tuple(self._stored)
        return tuple(self._appended.lengths_after(self._stored))

    @property
    def length(self) -> int:
        """Positions appended to the longest text."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, and of an append that waits to be attended."""
        waiting = self._appended
        more = 0 if waiting is None else waiting.key.nbytes + waiting.value.nbytes
        return more + sum(branch.nbytes for branch in self._branches)

    def append(
        self, key: Tensor, value: Tensor, *, seq_lens: Sequence[int] | Tensor | None = None
    ) -> None:
        """Adds key and value [batch, n, kv_heads, head_dim], which are copied, to the texts.

        They can be attended until the next append. seq_lens: how many of the n positions each text
        gets, from 0 to n, the first ones; n by default. Read on the host.

        Raises:
            TypeError, ValueError: another shape, dtype or device; more than max_seq_len in all.
        """
        appended = self._checked(key, value, seq_lens)
        self._store_appended()
        self._appended = appended._replace(key=key.detach().clone(), value=value.detach().clone())

    @overload
    def attend(
        self, query: Tensor, *, scale: float | None = ..., return_lse: Literal[False] = ...
    ) -> Tensor: ...
    @overload
    def attend(
        self, query: Tensor, *, scale: float | None = ..., return_lse: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...
    def attend(
        self, query: Tensor, *, scale: float | None = None, return_lse: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """out, like query [batch, n, heads, head_dim], of the n positions of the last append.

        Once for each append. scale, return_lse: as in `dilated_attention`. Positions past an
        entry's seq_lens have out 0 and lse -inf. What fails halfway, for want of memory or by
        Ctrl-C, resets the cache.

        Raises:
            TypeError, ValueError: another shape, dtype or device; no append to attend.
        """
        appended, scale = self._appended, check_scale(scale)
        if appended is None:
            raise ValueError(
                "query must be of positions that were appended and not attended, got one where "
                "there are none"
            )
        n = appended.key.shape[1]
        check_rows(query, "query", self.batch_size, self.num_heads, self._like, n)
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        lse = out.new_full((self.batch_size, self.num_heads, n), -torch.inf, dtype=exact)
        with self._changing(), torch.autocast(query.device.type, enabled=False):
            for run in appended.runs(self._stored):
                new_out, new_lse = self._attend_run(run, query, appended, scale)
                out[run.entries, : run.size] = new_out
                lse[run.entries, :, : run.size] = new_lse
            self._settle(appended)
        return (out, lse) if return_lse else out

    def reset(self) -> None:
        """Forgets all texts; the buffers remain."""
        self._stored, self._appended = [0] * self.batch_size, None

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Batch entry i becomes a copy of entry indices[i], of beams for example; the batch then
        has as many entries as indices. Read on the host."""
        chosen = integers(indices, "indices", 0, self.batch_size)
        if not chosen:
            raise ValueError("indices must be at least one integer, got none")
        where = torch.tensor(chosen, device=self.device)
        with torch.inference_mode(False):
            rows = [
                (branch.key.index_select(0, where), branch.value.index_select(0, where))
                for branch in self._branches
            ]
        for branch, (key, value) in zip(self._branches, rows, strict=True):  # all of them or none
            branch.key, branch.value = key, value
        self._stored = [self._stored[i] for i in chosen]
        if self._appended is not None:
            self._appended = self._appended.select(where)
        self.batch_size = len(chosen)

    def fork(self) -> DilatedKVCache:
        """A copy that shares no memory with this one."""
        with torch.inference_mode(False):
            return copy.deepcopy(self)

    def crop(self, length: int) -> None:
        """Refused, except for the present length: earlier rows are overwritten. `fork` before what
        may be taken back."""
        if set(self.lengths) != {length}:
            raise ValueError(
                f"length must be the cache's, {self.length}, as rows before it are overwritten "
                f"(fork the cache first), got {length}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` takes, for torch.save; its tensors are the cache's
        own."""
        return write_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a state of a cache with the same arguments.

        Raises:
            ValueError: a state of another pattern, batch, shape or dtype.
        """
        with torch.inference_mode(False):
            read_state(self, state)

    def _checked(
        self, key: Tensor, value: Tensor, seq_lens: Sequence[int] | Tensor | None
    ) -> Appended:
        check_rows(key, "key", self.batch_size, self.num_kv_heads, self._like)
        n = key.shape[1]
        check_rows(value, "value", self.batch_size, self.num_kv_heads, self._like, n)
        counts = (n,) * self.batch_size
        if seq_lens is not None:
            counts = integers(seq_lens, "seq_lens", 0, n + 1, self.batch_size)
        for present, more in zip(self.lengths, counts, strict=True):
            if self.max_seq_len is not None and present + more > self.max_seq_len:
                raise ValueError(
                    f"key must have at most {self.max_seq_len - present} positions more, where "
                    f"max_seq_len is {self.max_seq_len} and {present} are there, got {more}"
                )
        return Appended(key, value, counts)

    def _attend_run(
        self, run: Run, query: Tensor, appended: Appended, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse of a run's positions, whose rows are then stored."""
        rows = (query, appended.key, appended.value)
        query, key, value = (x[run.entries, : run.size] for x in rows)
        if run.begin == 0 and run.size > 1:  # the whole text: one ordinary call
            results = attend(
                query,
                key,
                value,
                self.scheme,
                is_causal=True,
                scale=scale,
                dropout_p=0.0,
                pattern_cache=None,
            )
            self._store(run, key, value)
            return results
        factor = self.head_dim**-0.5 if scale is None else scale
        parts = []
        cuts = pieces(self._layouts, run.begin, run.begin + run.size, _PIECE)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            piece = slice(begin - run.begin, end - run.begin)
            for branch in self._branches:
                branch.write(run.entries, begin, key[:, piece], value[:, piece])
            parts.append(attend_rows(query[:, piece], self._branches, run.entries, begin, factor))
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def _store(self, run: Run, key: Tensor, value: Tensor) -> None:
        """Of each branch the rows of the segment that the run ends in."""
        end = run.begin + run.size
        for branch in self._branches:
            w = branch.layout.segment_length
            begin = max(run.begin, (end - 1) // w * w)
            rows = (x[:, begin - run.begin :] for x in (key, value))
            branch.write(run.entries, begin, *rows)

    def _store_appended(self) -> None:
        """Stores an append that nobody attended."""
        if (appended := self._appended) is None:
            return
        with self._changing():
            for run in appended.runs(self._stored):
                rows = (x[run.entries, : run.size] for x in (appended.key, appended.value))
                self._store(run, *rows)
            self._settle(appended)

    def _settle(self, appended: Appended) -> None:
        self._stored = appended.lengths_after(self._stored)
        self._appended = None

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Rows are overwritten within: half of them would be neither the old text nor the new."""
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self.reset()
            raise
