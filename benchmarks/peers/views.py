"""Peers made of PyTorch's library attention on strided views, one call per branch and offset.

SdpaViews computes dilated attention exactly: no copy of q, k or v, one fused merge, and a backward
that gives each call the merged out and lse, so that its gradients are those of the one softmax. The
calls are cuDNN's or FlashAttention-2's, whose forward is faster on the workload. library_bound is
cuDNN's calls and nothing else: what no method of one call per branch gets under.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from torch import Tensor

from ..timing import Stopwatch, captured
from ..workloads import Workload
from . import combine, sdpa
from .calls import Calls, Gradients, Inputs
from .combine import Piece, make_pieces


def _forward(
    pieces: Sequence[Piece], inputs: Inputs, causal: bool, kernel: sdpa.Kernel = "cudnn"
) -> list[sdpa.Forward]:
    done = []
    for piece in pieces:
        query, key, value = (piece.rows(x) for x in inputs.qkv)
        done.append(sdpa.forward((query, key, value), causal, kernel))
    return done


def _backward(
    pieces: Sequence[Piece],
    inputs: Inputs,
    done: Sequence[sdpa.Forward],
    causal: bool,
    kernel: sdpa.Kernel = "cudnn",
) -> list[Gradients]:
    grads = []
    for piece, forward in zip(pieces, done, strict=True):
        query, key, value, grad_out = (piece.rows(x) for x in (*inputs.qkv, inputs.grad_out))
        grads.append(sdpa.backward(grad_out, (query, key, value), forward, causal, kernel))
    return grads


class SdpaViews:
    """The exact peer; remembers whose kernels are faster on a workload."""

    def __init__(self) -> None:
        self._faster: dict[tuple[str, bool], sdpa.Kernel] = {}

    def _kernel(self, workload: Workload, causal: bool, inputs: Inputs) -> sdpa.Kernel:
        """Whose forward takes less time, as one graph."""
        case = (workload.name, causal)
        if case not in self._faster:
            pieces, device = make_pieces(workload), inputs.query.device
            stopwatch = Stopwatch(device)

            def milliseconds(kernel: sdpa.Kernel) -> float:
                launch = captured(lambda: _forward(pieces, inputs, causal, kernel), device)
                return min(stopwatch.estimate_ms(launch) for _ in range(3))

            self._faster[case] = min(get_args(sdpa.Kernel), key=milliseconds)
        return self._faster[case]

    def __call__(self, workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        """Raises UnsupportedError where there are no such views."""
        pieces = make_pieces(workload)
        kernel = self._kernel(workload, causal, inputs)

        def attend() -> tuple[Tensor, Tensor, list[sdpa.Forward]]:
            done = _forward(pieces, inputs, causal, kernel)
            outs, lses = [one.out for one in done], [one.lse for one in done]
            return *combine.merge(pieces, outs, lses, inputs.query), done

        def differentiate(out: Tensor, lse: Tensor, done: list[sdpa.Forward]) -> Gradients:
            merged = []
            for piece, one in zip(pieces, done, strict=True):
                piece_lse = piece.lse_rows(lse).transpose(1, 2).flatten(0, 1)
                merged.append(sdpa.Forward(piece.rows(out), piece_lse, one.saved))
            parts = zip(*_backward(pieces, inputs, merged, causal, kernel), strict=True)
            query, key, value = (
                combine.add(pieces, part, x) for part, x in zip(parts, inputs.qkv, strict=True)
            )
            return query, key, value

        kept: list[tuple[Tensor, Tensor, list[sdpa.Forward]]] = []

        def backward() -> Gradients:
            if not kept:
                kept.append(attend())
            return differentiate(*kept[0])

        return Calls(
            lambda: attend()[0],
            backward,
            lambda: differentiate(*attend()),
            note=f"{kernel}'s kernels",
        )


def library_bound(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """cuDNN's time for every branch; what it computes is thrown away."""
    pieces = make_pieces(workload)
    kept: list[list[sdpa.Forward]] = []

    def forward() -> None:
        _forward(pieces, inputs, causal)

    def backward() -> None:
        if not kept:
            kept.append(_forward(pieces, inputs, causal))
        _backward(pieces, inputs, kept[0], causal)

    def both() -> None:
        _backward(pieces, inputs, _forward(pieces, inputs, causal), causal)

    return Calls(forward, backward, both)


def library_bound_fa4(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """The same with FlashAttention-4's sm90 path, forward only."""
    from flash_attn.cute import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
        flash_attn_func,
    )

    pieces = make_pieces(workload)
    attend: Callable[..., object] = flash_attn_func

    def forward() -> None:
        for piece in pieces:
            attend(*(piece.rows(x) for x in inputs.qkv), causal=causal)

    return Calls(forward)
