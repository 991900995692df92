"""What is installed and what runs, as text for a bug report."""

from __future__ import annotations

import os
import platform

import torch

from . import _C
from ._load import build_info, include_path, library_path, version


def report() -> str:
    """Versions, CUDA, GPUs, the CPU's instruction set, threads, and what the environment sets."""
    built_for = f"not built, {build_info.cuda_reason}"
    if build_info.with_cuda:
        built_for = f"{build_info.cuda_version}, architectures {build_info.cuda_architectures}"
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    lines = {
        "package": f"ring-dilated-attention {version}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{build_info.torch_version} at build time, {torch.__version__} now",
        "CUDA": f"kernels {built_for}; torch's CUDA {torch.version.cuda or 'none'}",
        "GPUs": _gpus(),
        "CPU": f"{platform.machine()}, {_C.cpu_instruction_set()}, {threads}",
        "settings": _settings(),
        "library": str(library_path),
        "headers": str(include_path),
    }
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name}, sm_{gpu.major}{gpu.minor}" for gpu in found)


def _settings() -> str:
    names = [name for name in os.environ if name.startswith("DILATED_")]
    names += [name for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES") if name in os.environ]
    return " ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "none"
