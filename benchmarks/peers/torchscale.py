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
