"""The implementations that are compared, by the names that the results use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dilated_attention_pytorch import dilated_attention

from ..timing import PROTOCOLS
from ..workloads import Workload, nominal_flops
from . import batches, sdpa
from .calls import Calls, Inputs, UnsupportedError, autograd_calls
from .flex import flex
from .torchscale import Torchscale
from .views import SdpaViews, library_bound, library_bound_fa4

# Whole-sequence attention is there for scale: no launch longer than about 0.6 s on an H200, and on
# a CPU about two seconds; and no backward past a tenth of that.
_FULL_FLOPS = {"cuda": 3e14, "cpu": 3e11}
_GRAPH_FLOPS = 1e11  # what takes longer does not wait for the host


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

    name: str
    prepare: Callable[[Workload, bool, Inputs], Calls]
    graphed: bool = False  # many small calls: timed as one CUDA graph
    same_output: bool = True
    same_gradient: bool = True
    takes_batches: bool = False  # of sequences, Workload.lengths
    protocols: tuple[str, ...] = PROTOCOLS


def ours(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """This library, called as a user calls it."""
    if workload.lengths:
        return batches.packed(workload, causal, inputs)
    options = {**workload.arguments, "is_causal": causal}

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cast(Tensor, dilated_attention(query, key, value, **options))

    return autograd_calls(function, inputs)


def ours_graph(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """The same to be captured, which takes the host's time out of short launches."""
    if not inputs.query.is_cuda or nominal_flops(workload, causal, "fwd") > _GRAPH_FLOPS:
        raise UnsupportedError("a graph is for launches that are short beside the host's time")
    calls = ours(workload, causal, inputs)
    return Calls(calls.forward, None, calls.both)  # a backward follows its forward's stream


def full_attention(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """Dense attention over the whole sequence, which computes something else."""
    if workload.key_heads != workload.heads:
        raise UnsupportedError("the aten operator wants as many key heads as heads")
    share = full_attention_share(workload, inputs.query.device.type)
    calls = autograd_calls(lambda *qkv: sdpa.forward(qkv, causal, "cudnn").out, inputs)
    return Calls(calls.forward) if share > 0.1 else calls


def _missing_torchscale(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    raise UnsupportedError("no checkout of torchscale was given (--torchscale)")


def make_impls(torchscale: Path | None) -> dict[str, Impl]:
    """All peers in the order in which they are measured; ValueError if that is no checkout."""
    theirs = _missing_torchscale if torchscale is None else Torchscale(torchscale)
    bound: dict[str, Any] = {"graphed": True, "same_output": False}
    impls = (
        Impl("ours", ours, takes_batches=True),
        Impl("ours-graph", ours_graph, graphed=True, takes_batches=True),
        Impl("ours-each", batches.one_by_one, takes_batches=True),
        Impl("ours-padded", batches.padded, same_output=False, takes_batches=True),
        # Its backward takes the branches' weights for constants.
        Impl("torchscale", theirs, same_gradient=False),
        Impl("sdpa-views", SdpaViews(), graphed=True),
        Impl("library-bound-cudnn", library_bound, **bound),
        Impl("library-bound-fa4", library_bound_fa4, **bound),
        Impl("full-attention", full_attention, same_output=False, protocols=("sustained",)),
        Impl("flex", flex),
    )
    return {impl.name: impl for impl in impls}


IMPLS = tuple(make_impls(None))
