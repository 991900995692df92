"""Peers made of PyTorch's library attention on strided views, one call per branch and offset.

SdpaViews computes dilated attention exactly: no copy of q, k or v, one fused merge, and a backward
that gives each call the merged out and lse, so that its gradients are those of the one softmax. The
calls are cuDNN's or FlashAttention-2's, whose forward is faster on the workload. library_bound is
cuDNN's calls and nothing else: what no method of one call per branch gets under.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ..timing import Stopwatch, captured
from ..workloads import Workload
from . import sdpa
from .calls import Calls, Inputs, Triple, UnsupportedError, make_calls


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions p with (p mod length) mod rate == offset, of the heads range(*heads)."""

    branch: int
    length: int
    rate: int
    offset: int
    heads: tuple[int, int, int]

    def rows(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> a view [B * segments, rows, heads, D]."""
        batch, seq_len, heads, head_dim = x.shape
        segments = batch * (seq_len // self.length)
        x = x.view(segments, self.length // self.rate, self.rate, heads, head_dim)
        return x[:, :, self.offset, slice(*self.heads)]

    def lse_rows(self, lse: Tensor) -> Tensor:
        """[B, H, N] -> a view [B, heads, segments, rows]."""
        batch, heads, seq_len = lse.shape
        shape = (batch, heads, seq_len // self.length, self.length // self.rate, self.rate)
        return lse.view(shape)[:, slice(*self.heads), :, :, self.offset]


def make_pieces(workload: Workload) -> list[Piece]:
    """All pieces of all branches. Raises UnsupportedError where no zero-copy view exists."""
    if workload.key_heads != workload.heads:
        raise UnsupportedError("grouped key heads have no zero-copy view per offset")
    pieces = []
    table = workload.spec(False).offset_table()
    for branch, ((length, rate), offsets) in enumerate(zip(workload.branches, table, strict=True)):
        length = min(length, workload.seq_len)
        if workload.seq_len % length or length % rate:
            raise UnsupportedError(
                f"segments of {length} at rate {rate} do not divide {workload.seq_len} tokens"
            )
        for offset in sorted(set(offsets)):  # by both rules, of heads at equal distances
            heads = [head for head, mine in enumerate(offsets) if mine == offset]
            step = heads[1] - heads[0] if len(heads) > 1 else 1
            pieces.append(Piece(branch, length, rate, offset, (heads[0], heads[-1] + 1, step)))
    return pieces


def merge(
    pieces: Sequence[Piece], done: Sequence[sdpa.Forward], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights by softmax denominators: out [B, N, H, D] like `like`, lse [B, H, N] float32."""
    batch, seq_len, heads, _ = like.shape
    lse = torch.empty((batch, heads, seq_len), dtype=torch.float32, device=like.device)
    if like.is_cuda:
        from .combine_triton import combine

        return combine(pieces, [x.out for x in done], [x.lse for x in done], like, lse), lse
    by_batch = [torch.unflatten(x.lse, 0, (batch, -1)).transpose(1, 2) for x in done]
    lse.fill_(-torch.inf)
    for piece, part in zip(pieces, by_batch, strict=True):
        view = piece.lse_rows(lse)
        view.copy_(view.logaddexp(part))
    out = torch.zeros_like(like, dtype=torch.float32)
    for piece, one, part in zip(pieces, done, by_batch, strict=True):
        weight = (part - piece.lse_rows(lse)).exp()
        weight = weight.permute(0, 2, 3, 1).flatten(0, 1)  # [segments, rows, heads]
        piece.rows(out).addcmul_(one.out.float(), weight[..., None])
    return out.to(like.dtype), lse


def add(pieces: Sequence[Piece], parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of the pieces, each where it belongs; rows of no piece are 0."""
    if like.is_cuda:
        from .combine_triton import combine

        return combine(pieces, parts, parts, like, None)
    total = torch.zeros_like(like, dtype=torch.float32)
    for piece, part in zip(pieces, parts, strict=True):
        piece.rows(total).add_(part)
    return total.to(like.dtype)


class _Branches:
    """All branches' attention calls, by one library's kernels."""

    def __init__(
        self, workload: Workload, causal: bool, inputs: Inputs, kernel: sdpa.Kernel = "cudnn"
    ) -> None:
        self.pieces, self._causal, self._kernel = make_pieces(workload), causal, kernel
        self._views = [[piece.rows(x) for x in inputs.all] for piece in self.pieces]

    def forward(self) -> list[sdpa.Forward]:
        return [sdpa.forward(views[:3], self._causal, self._kernel) for views in self._views]

    def backward(self, done: Sequence[sdpa.Forward]) -> list[Triple]:
        """`done` of each piece, whose out and lse may be those of all of them together."""
        return [
            sdpa.backward(grad_out, qkv, one, self._causal, self._kernel)
            for (*qkv, grad_out), one in zip(self._views, done, strict=True)
        ]


class SdpaViews:
    """The exact peer; remembers whose kernels are faster on a workload."""

    def __init__(self) -> None:
        self._faster: dict[tuple[str, bool], sdpa.Kernel] = {}

    def _kernel(self, workload: Workload, causal: bool, inputs: Inputs) -> sdpa.Kernel:
        """Whose forward takes less time, as one graph."""

        def milliseconds(kernel: sdpa.Kernel) -> float:
            branches = _Branches(workload, causal, inputs, kernel)
            launch = captured(branches.forward, stopwatch.device)
            return min(stopwatch.estimate_ms(launch) for _ in range(3))

        case = (workload.name, causal)
        if case not in self._faster:
            stopwatch = Stopwatch(inputs.query.device)
            self._faster[case] = min(get_args(sdpa.Kernel), key=milliseconds)
        return self._faster[case]

    def __call__(self, workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        """Raises UnsupportedError where there are no such views."""
        kernel = self._kernel(workload, causal, inputs)
        branches = _Branches(workload, causal, inputs, kernel)
        pieces = branches.pieces

        def attend() -> tuple[Tensor, Tensor, list[sdpa.Forward]]:
            done = branches.forward()
            return *merge(pieces, done, inputs.query), done

        def gradients(saved: tuple[Tensor, Tensor, list[sdpa.Forward]], _: bool) -> Triple:
            out, lse, done = saved
            merged = []
            for piece, one in zip(pieces, done, strict=True):
                piece_lse = piece.lse_rows(lse).transpose(1, 2).flatten(0, 1)
                merged.append(sdpa.Forward(piece.rows(out), piece_lse, one.saved))
            parts = zip(*branches.backward(merged), inputs.qkv, strict=True)
            return tuple(add(pieces, part, x) for *part, x in parts)

        return make_calls(lambda: attend()[0], attend, gradients, f"{kernel}'s kernels")


def library_bound(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """cuDNN's time for every branch; what it computes is thrown away."""
    branches = _Branches(workload, causal, inputs)
    return make_calls(branches.forward, branches.forward, lambda done, _: branches.backward(done))


def library_bound_fa4(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """The same with FlashAttention-4's sm90 path, forward only."""
    from flash_attn.cute import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        flash_attn_func,
    )

    views = [[piece.rows(x) for x in inputs.qkv] for piece in make_pieces(workload)]
    return Calls(lambda: [flash_attn_func(*qkv, causal=causal) for qkv in views])
