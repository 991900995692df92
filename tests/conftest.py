"""What all tests share: devices, tolerances and inputs.

Where DILATED_REQUIRE_CUDA=1 is set, a GPU and a build with CUDA are promised: every test fails if
one is missing, so that a broken GPU machine can't pass by skipping.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import dilated_attention_pytorch  # noqa: F401  (registers torch.ops.dilated)
from dilated_attention_pytorch import _C


def missing_cuda() -> str | None:
    """Why CUDA tests can't run here; None if they can."""
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if not _C.built_with_cuda():
        return "the library was built without CUDA"
    return None


@pytest.fixture(scope="session", autouse=True)
def promised_cuda() -> None:
    reason = missing_cuda()
    if os.environ.get("DILATED_REQUIRE_CUDA") == "1" and reason is not None:
        pytest.fail(f"DILATED_REQUIRE_CUDA=1, but {reason}")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and (reason := missing_cuda()) is not None:
        pytest.skip(reason)
    return str(request.param)


class Exact(NamedTuple):
    """The widest dtype of a device, and how far it may be from the float64 reference.

    float64 (CPU only): sums of at most a few thousand terms of order 1 in eps = 2.2e-16. float32:
    eps = 1.2e-7, the same sums. Gradients pass through three products; float64 shows it.
    """

    dtype: torch.dtype
    forward: float
    backward: float


EXACT = {"cpu": Exact(torch.float64, 1e-12, 1e-11), "cuda": Exact(torch.float32, 1e-5, 1e-5)}


@pytest.fixture
def exact(device: str) -> Exact:
    return EXACT[device]


def _row_tensor(
    shape: Sequence[int], dtype: torch.dtype, device: str, generator: torch.Generator, poison: bool
) -> Tensor:
    batch, seq_len, heads, head_dim = shape
    data = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if not poison:
        return data.to(device)
    # Rows before and after, one more head and 8 more columns, all NaN: whoever reads outside sees
    # it.
    wide = torch.full(
        (batch, seq_len + 2, heads + 1, head_dim + 8), torch.nan, dtype=dtype, device=device
    )
    inner = wide[:, 1 : seq_len + 1, :heads, :head_dim]
    inner.copy_(data)
    return inner


def make_qkv(
    seq_len: int,
    heads: int = 4,
    head_dim: int = 16,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = False,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal query [B, N, H, D], key and value [B, N, Hkv, D]; the numbers depend on the seed only,
    not on the device.

    With `poison` the tensors are views into storage that holds NaN everywhere else.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, seq_len, n, head_dim) for n in (heads, kv_heads or heads, kv_heads or heads)]
    q, k, v = (_row_tensor(shape, dtype, device, generator, poison) for shape in shapes)
    if requires_grad:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return q, k, v


@pytest.fixture
def train_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """examples/train_bytes.py in this process, for what ends soon; a call with its arguments."""
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(folder))
    program = importlib.import_module("train_bytes")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(folder / "train_bytes.py"), *arguments])
        status: int = program.main()
        return status

    return call
