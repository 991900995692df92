"""Where a benchmark ran: commit, device, driver, versions, and the device's two ceilings."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .device_state import Monitor
from .timing import Stopwatch, sustained

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COMMIT_VARIABLE = "DILATED_BENCHMARK_COMMIT"


def find_commit(given: str | None) -> str:
    """As given, else git's, else the environment variable's, else "unknown"."""
    if given:
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return os.environ.get(COMMIT_VARIABLE, "unknown")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def slug(name: str) -> str:
    """A file name's part: lower case, letters and digits joined by single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        if torch.cuda.is_available()
        else None,
    }
    for package in ("ring-dilated-attention", "triton", "flash-attn-4"):
        try:
            found[package] = importlib.metadata.distribution(package).version
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def measure_ceilings(stopwatch: Stopwatch, monitor: Monitor) -> dict[str, float]:
    """A large matrix product (bf16; float32 on the CPU), and a copy, bytes read plus written."""
    device = stopwatch.device
    is_cuda = device.type == "cuda"
    size, copied = (8192, 2**31) if is_cuda else (1024, 2**27)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(copied // 4, device=device).normal_()
    target = torch.empty_like(source)
    launches = (lambda: torch.mm(left, right, out=product), lambda: target.copy_(source))
    matmul, copy = sustained(launches, stopwatch, monitor)
    return {
        "matmul_tflops": 2 * size**3 / matmul.ms * 1e-9,
        "copy_gbps": 2 * copied / copy.ms * 1e-6,
    }


def describe(device: torch.device, monitor: Monitor, commit: str | None) -> dict[str, Any]:
    """The head of a results file; see schema.py."""
    clocks = monitor.describe()
    return {
        "commit": find_commit(commit),
        "device": device_name(device),
        "driver": clocks.pop("driver", None),
        "versions": versions(),
        "clocks": clocks,
    }
