"""What a peer gives the runner: its passes as functions of no argument, over fixed inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..workloads import Pass, Workload

Triple = Sequence[Tensor]  # query, key and value, or their gradients
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, N, H, D] -> [B, N, H, D]
Saved = TypeVar("Saved")


class UnsupportedError(Exception):
    """This peer can't compute this workload; the message says why."""


def reason(error: BaseException) -> str:
    """What the results say of a peer that was skipped."""
    is_known = isinstance(error, UnsupportedError)
    return str(error) if is_known else f"{type(error).__name__}: {error}"[:400]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Normal tensors: query and grad_out [B, N, H, D], key and value [B, N, Hkv, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor

    @staticmethod
    def make(workload: Workload, device: torch.device, seed: int = 0) -> Inputs:
        """On a CPU float32, which all its kernels take."""
        dtype = workload.torch_dtype if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(seed)
        shapes = (workload.query_shape, workload.key_shape, workload.key_shape)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        return Inputs(*(torch.randn(s, **options) for s in (*shapes, workload.query_shape)))

    @property
    def qkv(self) -> Triple:
        return self.query, self.key, self.value

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (*self.qkv, self.grad_out)


@dataclass(frozen=True, slots=True)
class Calls:
    """The passes over one set of inputs; a missing one is not measured.

    forward returns out, backward and both the gradients of query, key and value. `backward` runs
    its own forward at the first call and keeps what it saved. `restore` brings a result into
    [B, N, H, D] order where the peer works in another; it is not timed.
    """

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None = None
    both: Callable[[], Any] | None = None
    restore: Callable[[Tensor], Tensor] = lambda x: x
    note: str | None = None  # of how this workload is computed, for the results
    sent: Callable[[], int] = lambda: 0  # bytes that this rank has sent so far

    def get(self, pass_: Pass) -> Callable[[], Any] | None:
        return {"fwd": self.forward, "bwd": self.backward, "fwd+bwd": self.both}.get(pass_)


def make_calls(
    forward: Callable[[], object],
    attend: Callable[[], Saved],
    gradients: Callable[[Saved, bool], Sequence[object]],
    note: str | None = None,
) -> Calls:
    """attend: a forward that saves what `gradients` takes, which is told whether it is kept."""
    kept: list[Saved] = []

    def backward() -> Sequence[object]:
        if not kept:
            kept.append(attend())
        return gradients(kept[0], True)

    return Calls(forward, backward, lambda: gradients(attend(), False), note=note)


def autograd_calls(function: Attention, inputs: Inputs) -> Calls:
    """The passes of a differentiable function."""
    leaves = [x.detach().requires_grad_() for x in inputs.qkv]

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs.qkv)

    def gradients(out: Tensor, is_kept: bool) -> Triple:
        return torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=is_kept)

    return make_calls(forward, lambda: function(*leaves), gradients)
