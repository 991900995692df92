"""Results files: JSON objects that say where and how something was measured, and their rows.

A run adds to its document as it goes; what it has measured is in the file at any moment. Lists are
written one entry a line.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .device_state import Monitor, make_monitor
from .timing import Stopwatch, sustained

Document = dict[str, Any]
Row = dict[str, Any]
Pass = Literal["fwd", "bwd", "fwd+bwd", "host"]
Protocol = Literal["sustained", "isolated"]
PASSES: tuple[Pass, ...] = get_args(Pass)
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
IMPLS = (
    *("ours", "ours-graph", "torchscale", "sdpa-views", "library-bound-cudnn"),
    *("library-bound-fa4", "flex", "full-attention"),
)
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# What a file of `ops` holds, and each of its rows. Times are milliseconds per launch; peak_mib is
# beyond the inputs; None is "not known". Rows may have more: relative_error (of the output or,
# where gradients are made, the worst one), launch_ms ("host" rows: the host's time for a kernel of
# one element), note.
_HEADER = (
    "commit",
    "device",
    "driver",
    "versions",
    "clocks",
    "date",
    "ceilings",
    "rows",
    "skipped",
)
_COLUMNS = (
    *("workload", "causal", "impl", "pass", "protocol", "ms", "ms_p10", "ms_p90"),
    *("nominal_tflops", "peak_mib", "sm_mhz", "watts", "launches"),
)


def check(document: Mapping[str, Any]) -> None:
    """Raises ValueError that says where a file of `ops` is not as above."""
    missing = [key for key in _HEADER if key not in document]
    if missing:
        raise ValueError(f"results: {missing} must be there, got {sorted(document)}")
    for index, row in enumerate(document["rows"]):
        lacking = [key for key in _COLUMNS if key not in row]
        if lacking:
            raise ValueError(f"rows[{index}]: {lacking} must be there, got {sorted(row)}")
        for key, known in (("impl", IMPLS), ("pass", PASSES), ("protocol", PROTOCOLS)):
            if row[key] not in known:
                raise ValueError(f"rows[{index}]: {key} must be among {known}, got {row[key]!r}")
        if not 0 <= row["ms_p10"] <= row["ms"] <= row["ms_p90"]:
            raise ValueError(f"rows[{index}]: ms_p10 <= ms <= ms_p90 must hold, got {row}")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replaces the file in one step, so that a run that is killed leaves the last whole one."""
    fields = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        fields.append(f" {json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    os.replace(temporary, path)


def read(folder: Path, name: str) -> list[Document]:
    """The results files of one benchmark, oldest first, each with its name as `file`.

    Raises:
        ValueError: a file of `ops` is not what `check` wants.
    """
    paths = sorted(folder.glob(f"{name}-*.json"))
    documents = [json.loads(path.read_text()) | {"file": path.name} for path in paths]
    for document in documents if name == "ops" else ():
        check(document)
    return sorted(documents, key=lambda document: str(document["date"]))


class Run:
    """One run of a benchmark: what its measurements share, and the document they add up to.

    options: of the command line; bench.py has those of every benchmark. device: if not the
    options'. Of several ranks only one `writes`.
    """

    def __init__(
        self,
        name: str,
        options: argparse.Namespace,
        device: torch.device | None = None,
        writes: bool = True,
    ) -> None:
        device = device or torch.device(options.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self._writes = device, writes
        self.stopwatch, self.monitor = Stopwatch(device), make_monitor(device)
        self._began = time.monotonic()
        self.deadline: float = self._began + options.budget_seconds
        now = datetime.datetime.now(datetime.timezone.utc)
        clocks = self.monitor.describe()
        self.document: Document = {
            "commit": find_commit(options.commit),
            "device": device_name(device),
            "driver": clocks.pop("driver", None),
            "versions": versions(),
            "clocks": clocks,
            "device_type": device.type,
            "date": now.isoformat(timespec="seconds"),
        }
        if device.type == "cpu":
            self.document["threads"] = torch.get_num_threads()
        self.document |= {"rows": [], "skipped": []}
        parts = [name, slug(self.document["device"]), f"{now:%Y-%m-%d}", slug(options.tag)]
        self.path: Path = options.out / ("-".join(part for part in parts if part) + ".json")

    @property
    def rows(self) -> list[Row]:
        return self.document["rows"]  # type: ignore[no-any-return]

    def skip(self, reason: str, **what: Any) -> None:
        self.document["skipped"].append({**what, "reason": reason})

    def is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def say(self, text: str) -> None:
        """A line of progress, with the seconds since the run began."""
        if self._writes:
            print(f"{time.monotonic() - self._began:5.0f} s  {text}", flush=True)

    def write(self) -> None:
        if self._writes:
            write(self.path, self.document)


def find_commit(given: str | None) -> str:
    """As given, else git's, else "unknown"."""
    if given:
        return given
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A command line's type: some of the known names, with commas between."""
    allowed = list(known)

    def parse(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        unknown = [name for name in found if name not in allowed]
        if unknown or not found:
            must = f"must be among {', '.join(allowed)}"
            raise argparse.ArgumentTypeError(f"{must}, got {', '.join(unknown) or 'none'}")
        return found

    return parse


def slug(name: str) -> str:
    """A file name's part: lower case, letters and digits joined by single hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }
    for package in ("ring-dilated-attention", "triton", "flash-attn-4"):
        try:
            found[package] = importlib.metadata.version(package)
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
