"""Loads libdilated.so, which registers `torch.ops.dilated`.

PyTorch's C++ interface is stable only within a minor release, so the running torch is compared with
the build's before loading: the dynamic loader would report an undefined symbol, or nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

__all__ = [
    "build_info",
    "cmake_prefix_path",
    "cuda_kernels_missing",
    "include_path",
    "library_path",
    "mismatch",
    "version",
    "vouch",
]

_REBUILD = (
    "Install it again, with the torch that you use, from the repository's root: "
    "pip install --no-build-isolation --no-deps --force-reinstall ."
)


def mismatch(build: ModuleType, torch_version: str, torch_cuda: str | None) -> str | None:
    """Why a build can't run with a torch; None if it can.

    `build` has the fields of `_build_info`; `torch_version` and `torch_cuda` are
    `torch.__version__` and `torch.version.cuda`.
    """
    built, running = (v.split("+")[0].split(".")[:2] for v in (build.torch_version, torch_version))
    if built != running:
        return f"was compiled against torch {build.torch_version}, but torch {torch_version} runs"
    if not build.with_cuda:
        return None
    if torch_cuda is None:
        return f"was compiled with CUDA {build.cuda_version}, but torch {torch_version} has no CUDA"
    if torch_cuda.split(".")[0] != build.cuda_version.split(".")[0]:
        return f"was compiled with CUDA {build.cuda_version}, but torch has CUDA {torch_cuda}"
    return None


def cuda_kernels_missing(device: int = 0) -> str | None:
    """Why this build's kernels can't run on a GPU of torch's, as the end of a sentence; None if
    they can.
    """
    if not build_info.with_cuda:
        return f"this build has no CUDA kernels ({build_info.cuda_reason})"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the kernels need sm_80 or later, and it is of sm_{major}{minor}"
    return None


def _find_prefix() -> Path:
    """The folder that CMake installed into; in an editable install it isn't this file's."""
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is None or spec.origin is None:
        raise ImportError(f"{__package__} is not compiled for this Python. {_REBUILD}")
    return Path(spec.origin).parent


prefix = _find_prefix()
library_path = prefix / "lib" / "libdilated.so"
include_path = prefix / "include"
cmake_prefix_path = prefix / "share" / "cmake"

from . import _build_info as build_info  # noqa: E402  (exists where _C does)

version = build_info.version
_reason = mismatch(build_info, torch.__version__, torch.version.cuda)
if _reason is not None:
    raise ImportError(f"{__package__} {_reason}. {_REBUILD}")
torch.ops.load_library(library_path)  # type: ignore[no-untyped-call]
# Here for the caches, which must not import `ops`.
vouch = torch.ops.dilated.vouch.default
