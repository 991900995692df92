"""The implementations that are compared, by the names that the results use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from dilated_attention_pytorch import dilated_attention

from . import sdpa
from .calls import Calls, Inputs, UnsupportedError, autograd_calls
from .flex import flex
from .schema import PROTOCOLS, ImplName, Protocol
from .sdpa_views import SdpaViews, library_bound, library_bound_fa4
from .workloads import Workload

# Whole-sequence attention is there for scale: no launch longer than about 0.6 s on an H200, and on
# a CPU about a second; and no backward past a tenth of that.
_FULL_FLOPS = {"cuda": 3e14, "cpu": 1e11}


def full_attention_share(workload: Workload, device_type: str, ranks: int = 1) -> float:
    """A rank's operations, of the most that a launch may have; raises UnsupportedError above 1."""
    batch, seq_len, heads, head_dim = workload.query_shape
    flops = 4 * batch * heads * head_dim * seq_len**2 / ranks
    if flops > _FULL_FLOPS[device_type]:
        raise UnsupportedError(f"{flops:.2g} operations take longer than the run has")
    return flops / _FULL_FLOPS[device_type]


@dataclass(frozen=True, slots=True)
class Impl:
    """One peer: how to make its calls, and what is to be expected of them."""

    name: ImplName
    prepare: Callable[[Workload, bool, Inputs], Calls]
    graphed: bool = False  # many small calls: timed as one CUDA graph
    same_output: bool = True
    same_gradient: bool = True
    protocols: tuple[Protocol, ...] = PROTOCOLS
    note: str | None = None


def ours(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """This library, called as a user calls it."""

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = dilated_attention(
            query,
            key,
            value,
            workload.segment_lengths,
            workload.dilation_rates,
            head_offsets=workload.head_offsets,
            is_causal=causal,
            padding=workload.padding,
        )
        assert isinstance(out, Tensor)
        return out

    return autograd_calls(function, inputs)


def full_attention(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """Dense attention over the whole sequence, which computes something else."""
    if workload.key_heads != workload.heads:
        raise UnsupportedError("the aten operator wants as many key heads as heads")
    share = full_attention_share(workload, inputs.query.device.type)

    def function() -> sdpa.Forward:
        return sdpa.forward(inputs.qkv, causal, "cudnn")

    kept: list[sdpa.Forward] = []

    def gradients(done: sdpa.Forward) -> tuple[Tensor, Tensor, Tensor]:
        return sdpa.backward(inputs.grad_out, inputs.qkv, done, causal, "cudnn")

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        if not kept:
            kept.append(function())
        return gradients(kept[0])

    def forward() -> Tensor:
        return function().out

    if share > 0.1:
        return Calls(forward)
    return Calls(forward, backward, lambda: gradients(function()))


class Torchscale:
    """torchscale's own module, from a checkout, with PyTorch's flash kernel for flash-attn's."""

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "torchscale" / "component" / "dilated_attention.py").is_file():
            raise ValueError(
                f"torchscale must be a checkout of microsoft/torchscale, got {checkout}"
            )
        if str(checkout) not in sys.path:
            sys.path.insert(0, str(checkout))
        attention: Any = importlib.import_module("torchscale.component.multihead_attention")
        dilated: Any = importlib.import_module("torchscale.component.dilated_attention")
        attention.flash_attn_func = _flash_attn_func
        self._module_type = dilated.DilatedAttention

    def __call__(self, workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        self._check(workload, causal)
        # Its forward begins and ends with projections, which are not what is compared; so only its
        # gathering, attention and scattering run, on an instance without parameters.
        module: Any = self._module_type.__new__(self._module_type)
        module.__dict__.update(
            num_heads=workload.heads,
            dropout=0.0,
            args=SimpleNamespace(
                flash_attention=True,
                segment_length=list(workload.segment_lengths),
                dilated_ratio=list(workload.dilation_rates),
            ),
        )

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outs, lses = [], []
            for length, rate in zip(workload.segment_lengths, workload.dilation_rates, strict=True):
                parts = [
                    module.gathering(
                        x, rate, length, is_causal=causal, is_kv=i > 0, seq_parall=False
                    )
                    for i, x in enumerate((query, key, value))
                ]
                out, lse = module.attention_ops(*parts, is_causal=causal)
                outs.append(out)
                lses.append(lse)
            batch, seq_len = query.shape[:2]
            joined: Tensor = module.scattering(outs, lses, seq_len, batch)
            return joined.view(query.shape)

        return autograd_calls(function, inputs)

    @staticmethod
    def _check(workload: Workload, causal: bool) -> None:
        if workload.key_heads != workload.heads:
            raise UnsupportedError("torchscale has no grouped key heads")
        if workload.head_offsets != "blocked":
            raise UnsupportedError("torchscale has blocked offsets only")
        branches = zip(workload.segment_lengths, workload.dilation_rates, strict=True)
        clipped = [(min(w, workload.seq_len), r) for w, r in branches]
        whole = all(workload.seq_len % w == 0 and w % r == 0 for w, r in clipped)
        if not whole and not causal and workload.padding != "zeros":
            raise UnsupportedError("torchscale pads with keys of score 0")


def _flash_attn_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    mask: Tensor | None,
    scale: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    if dropout or mask is not None or scale is not None:
        raise UnsupportedError("only plain attention is benchmarked")
    out, lse = sdpa.Flash.apply(query, key, value, causal)  # type: ignore[no-untyped-call]
    return out, lse


def _missing_torchscale(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    raise UnsupportedError("no checkout of torchscale was given (--torchscale)")


def make_impls(torchscale: Path | None) -> dict[ImplName, Impl]:
    """All peers in the order in which they are measured; ValueError if that is no checkout."""
    impls = (
        Impl("ours", ours),
        Impl(
            "torchscale",
            _missing_torchscale if torchscale is None else Torchscale(torchscale),
            same_gradient=False,
            note="its backward takes the branches' weights for constants",
        ),
        Impl("sdpa-views", SdpaViews(), graphed=True),
        Impl(
            "library-bound-cudnn",
            library_bound,
            graphed=True,
            same_output=False,
            note="all branches' attention calls, without a merge",
        ),
        Impl(
            "library-bound-fa4",
            library_bound_fa4,
            graphed=True,
            same_output=False,
            note="all branches' attention calls, without a merge",
        ),
        Impl(
            "full-attention",
            full_attention,
            same_output=False,
            protocols=("sustained",),
            note="every query attends to the whole sequence",
        ),
        Impl("flex", flex, note="tokens already in class order"),
    )
    return {impl.name: impl for impl in impls}
