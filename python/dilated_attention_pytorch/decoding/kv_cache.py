"""A cache of keys and values that keeps only what some later query can meet."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..functional import attend, check_scale
from ..pattern import HeadOffsets, Scheme
from ..pattern.bounds import HEADS_END, SEQ_LEN_END, at_least
from .appended import Appended
from .arguments import MOST_BRANCHES, check_dtype, check_rows, integers
from .layout import cuts
from .rows import ForgettingRows
from .state import read_state, write_state


class DilatedKVCache:
    """Keys and values of a text that grows, and the attention of its last positions to it.

    `append` some positions, then `attend` from them: the numbers are those of one causal
    `dilated_attention` over the whole text. Of each branch only the rows of the segment that is
    being written are kept, at most ceil(w / r) of a KV head, so memory and time of a step don't
    grow with the text. Gives no gradients.

    A step, one position appended to each text and attended, can be captured in a CUDA graph and
    replayed for all that follow: how long the texts are, the device knows. An append past
    max_seq_len then stops the device.

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
        if len(self.scheme.branches) > MOST_BRANCHES:
            raise ValueError(
                f"segment_lengths must be at most {MOST_BRANCHES} branches, "
                f"got {len(self.scheme.branches)}"
            )
        self._like = torch.empty(self.head_dim, dtype=dtype, device=device)
        check_dtype(self.dtype, self.device)
        shape = (self.batch_size, self.num_heads, self.num_kv_heads, self.head_dim)
        self._rows = ForgettingRows(self.scheme, shape, self.max_seq_len, self._like)
        # Positions before those of the last append, which the rows' lengths on the device count; a
        # graph that captured a step may advance those alone.
        self._known: list[int] = [0] * self.batch_size
        self._captured = False
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
        stored = self._stored()
        return tuple(stored if self._appended is None else self._appended.lengths_after(stored))

    @property
    def length(self) -> int:
        """Positions appended to the longest text."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, and of an append that waits to be attended."""
        waiting = self._appended
        more = 0 if waiting is None else waiting.key.nbytes + waiting.value.nbytes
        return more + self._rows.nbytes

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
        with self._changing(), torch.autocast(query.device.type, enabled=False):
            out, lse = self._attend(query.detach(), appended, scale)
            self._settle(appended)
        return (out, lse) if return_lse else out

    def reset(self) -> None:
        """Forgets all texts; the memory remains."""
        self._set_lengths([0] * self.batch_size)

    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Batch entry i becomes a copy of entry indices[i], of beams for example; the batch then
        has as many entries as indices. Read on the host."""
        chosen = integers(indices, "indices", 0, self.batch_size)
        if not chosen:
            raise ValueError("indices must be at least one integer, got none")
        if self._captured and len(chosen) != self.batch_size:
            raise ValueError(
                f"indices must be {self.batch_size}, as many as the batch that a CUDA graph has "
                f"captured, got {len(chosen)}"
            )
        stored = self._stored()
        where = torch.tensor(chosen, device=self.device)
        self._rows.select(where)
        self._known = [stored[i] for i in chosen]
        if self._appended is not None:
            self._appended = self._appended.select(where)
        self.batch_size = len(chosen)

    def fork(self) -> DilatedKVCache:
        """A copy that shares no memory with this one."""
        with torch.inference_mode(False):
            made = copy.deepcopy(self)
        made._known, made._captured = self._stored(), False
        return made

    def crop(self, length: int) -> None:
        """Refused, except for the present length: earlier rows are overwritten. `fork` before what
        may be taken back."""
        lengths = self.lengths
        if set(lengths) != {length}:
            present = lengths if len(set(lengths)) > 1 else lengths[0]
            raise ValueError(
                f"length must be the cache's, {present}, as rows before it are overwritten "
                f"(fork the cache first), got {length}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` takes, for torch.save; its tensors are the cache's
        own."""
        return write_state(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a state of a cache with the same arguments.

        Raises:
            TypeError, ValueError: a state of another pattern, batch, shape or dtype, or of longer
                texts than its rows or max_seq_len are for. The cache is then as it was.
        """
        with torch.inference_mode(False):
            read_state(self, state)

    def _checked(
        self, key: Tensor, value: Tensor, seq_lens: Sequence[int] | Tensor | None
    ) -> Appended:
        check_rows(key, "key", self.batch_size, self.num_kv_heads, self._like)
        n = key.shape[1]
        check_rows(value, "value", self.batch_size, self.num_kv_heads, self._like, n)
        counts = None
        if seq_lens is not None:
            counts = integers(seq_lens, "seq_lens", 0, n + 1, self.batch_size)
        appended = Appended(key, value, counts)
        if self._is_capturing():
            if self._rows.grows or counts is not None:
                what = "max_seq_len" if self._rows.grows else "no seq_lens"
                raise ValueError(
                    f"{what} must be given where a CUDA graph captures an append, got "
                    f"{'None' if self._rows.grows else seq_lens}"
                )
        elif self.max_seq_len is not None:
            for present, after in zip(
                self.lengths, appended.lengths_after(self.lengths), strict=True
            ):
                if after > self.max_seq_len:
                    raise ValueError(
                        f"key must have at most {self.max_seq_len - present} positions more, where "
                        f"max_seq_len is {self.max_seq_len} and {present} are there, "
                        f"got {after - present}"
                    )
        return appended

    def _attend(
        self, query: Tensor, appended: Appended, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """out and lse of the appended positions, whose rows are then stored."""
        rows, n = (query, appended.key, appended.value), appended.size
        pieces = list(range(n + 1)) if self._is_capturing() or n < 2 else None
        if pieces is None:
            stored = self._stored()
            if max(stored) == 0:  # the whole texts: one ordinary call
                out, lse = attend(
                    *rows,
                    self.scheme,
                    is_causal=True,
                    scale=scale,
                    dropout_p=0.0,
                    seq_lens=appended.counts,
                    pattern_cache=None,
                )
                self._append(appended)
                return out, lse
            pieces = cuts(self.scheme.segment_lengths, stored, n)
        self._reserve(appended)
        parts = []
        for begin, end in pairwise(pieces if n else [0, 0]):
            counts = appended.counts_of(begin, end)
            query, key, value = (x[:, begin:end] for x in rows)
            parts.append(self._rows.step(query, key, value, counts, scale))
        if len(parts) == 1:
            return parts[0]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def _append(self, appended: Appended) -> None:
        self._reserve(appended)
        self._rows.append(appended.key, appended.value, appended.counts_of(0, appended.size))

    def _reserve(self, appended: Appended) -> None:
        if self._rows.grows:
            self._rows.reserve(max(appended.lengths_after(self._stored())))

    def _store_appended(self) -> None:
        """Stores an append that nobody attended."""
        if (appended := self._appended) is None:
            return
        with self._changing():
            self._append(appended)
            self._settle(appended)

    def _settle(self, appended: Appended) -> None:
        if self._is_capturing():
            self._captured = True
        elif not self._captured:
            self._known = appended.lengths_after(self._known)
        self._appended = None

    def _stored(self) -> list[int]:
        """Positions before those of the last append; once a graph has captured a step, the host
        waits for the device to tell."""
        if self._captured:
            self._known = self._rows.lengths.tolist()
        return self._known

    def _set_lengths(self, lengths: Sequence[int]) -> None:
        self._appended, self._known = None, list(lengths)
        self._rows.lengths.copy_(torch.tensor(self._known))

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Rows are overwritten within: half of them would be neither the old text nor the new."""
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self.reset()
            raise
