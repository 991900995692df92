"""torchscale as a peer: its own module, from a checkout, on PyTorch's flash kernel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..workloads import Workload
from . import sdpa
from .calls import Calls, Inputs, UnsupportedError, autograd_calls


def _flash_attn_func(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, mask: Any, scale: Any, causal: bool
) -> tuple[Tensor, Tensor]:
    """flash-attn's, as torchscale calls it: no dropout, no mask; no gradient of lse either."""
    done = sdpa.forward((query, key, value), causal, "flash")
    return done.out, done.lse


class Torchscale:
    """Its forward begins and ends with projections, which are not what is compared; so only its
    gathering, attention and scattering run, on an instance without parameters.
    """

    def __init__(self, checkout: Path) -> None:
        if not (checkout / "torchscale" / "component" / "dilated_attention.py").is_file():
            raise ValueError(
                f"torchscale must be a checkout of microsoft/torchscale, got {checkout}"
            )
        sys.path.insert(0, str(checkout))
        attention: Any = importlib.import_module("torchscale.component.multihead_attention")
        dilated: Any = importlib.import_module("torchscale.component.dilated_attention")
        attention.flash_attn_func = _flash_attn_func
        self._module_type = dilated.DilatedAttention

    def __call__(self, workload: Workload, causal: bool, inputs: Inputs) -> Calls:
        _check(workload, causal)
        branches = workload.branches
        module: Any = self._module_type.__new__(self._module_type)
        args = SimpleNamespace(
            flash_attention=True,
            segment_length=list(workload.segment_lengths),
            dilated_ratio=list(workload.dilation_rates),
        )
        module.__dict__.update(num_heads=workload.heads, dropout=0.0, args=args)

        def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            outs, lses = [], []
            for length, rate in branches:
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


def _check(workload: Workload, causal: bool) -> None:
    if workload.key_heads != workload.heads:
        raise UnsupportedError("torchscale has no grouped key heads")
    if workload.head_offsets != "blocked":
        raise UnsupportedError("torchscale has blocked offsets only")
    clipped = [(min(length, workload.seq_len), rate) for length, rate in workload.branches]
    whole = all(workload.seq_len % w == 0 and w % r == 0 for w, r in clipped)
    if not whole and not causal and workload.padding != "zeros":
        raise UnsupportedError("torchscale pads with keys of score 0")
