"""What a peer gives the runner: its passes as functions of no argument, over fixed inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..results import Pass
from ..workloads import Workload

Gradients = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # [B, N, H, D] -> [B, N, H, D]


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
    def make(workload: Workload, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shapes = (workload.query_shape, workload.key_shape, workload.key_shape)
        query, key, value, grad = (
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            for shape in (*shapes, workload.query_shape)
        )
        return Inputs(query, key, value, grad)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.qkv, self.grad_out))


@dataclass(frozen=True, slots=True)
class Calls:
    """The passes over one set of inputs; a missing one is not measured.

    forward returns out, backward and both the gradients of query, key and value. `backward` runs
    its own forward at the first call and keeps what it saved. `restore` brings a result into
    [B, N, H, D] order where the peer works in another; it is not timed.
    """

    forward: Callable[[], Tensor | None]
    backward: Callable[[], Gradients | None] | None = None
    both: Callable[[], Gradients | None] | None = None
    restore: Callable[[Tensor], Tensor] = lambda x: x
    note: str | None = None  # of how this workload is computed, for the results

    def get(self, pass_: Pass) -> Callable[[], object] | None:
        return {"fwd": self.forward, "bwd": self.backward, "fwd+bwd": self.both}.get(pass_)


def autograd_calls(function: Attention, inputs: Inputs) -> Calls:
    """The passes of a differentiable function."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs.qkv)
    kept: list[Tensor] = []

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs.qkv)

    def gradients(out: Tensor, keep: bool) -> Gradients:
        query, key, value = torch.autograd.grad(out, leaves, inputs.grad_out, retain_graph=keep)
        return query, key, value

    def backward() -> Gradients:
        if not kept:
            kept.append(function(*leaves))
        return gradients(kept[0], True)

    return Calls(forward, backward, lambda: gradients(function(*leaves), False))
