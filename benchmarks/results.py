"""Results files: JSON objects that say where and how something was measured, and their rows.

A run adds to its document as it goes; what it has measured is in the file at any moment. Lists are
written one entry a line.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .timing import Stopwatch
from .workloads import Workload

Document = dict[str, Any]
Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# A file has commit, device, driver, versions, clocks, date, rows and skipped; ops' also ceilings.
# A row of ops has workload, causal, impl, pass, protocol; ms, ms_p10, ms_p90 a launch, launches;
# nominal_tflops; peak_mib beyond the inputs; sm_mhz and watts meanwhile. None is "not known". It
# may have relative_error (of the output or, where gradients are made, the worst one), note, and of
# "host" launch_ms, the host's time for a kernel of one element.


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


def find(rows: Iterable[Row], **wanted: Any) -> Row:
    """The first row that has these values, `pass_` being "pass"; an empty one if there is none."""
    values = {name.rstrip("_"): value for name, value in wanted.items()}
    return next((row for row in rows if values.items() <= row.items()), {})


class OutOfTimeError(Exception):
    """The budget's seconds are over."""


class Run:
    """One run of a benchmark: what its measurements share, and the document they add up to.

    options: of the command line; bench.py has those of every benchmark. Of several ranks, the first
    writes.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.device = device = torch.device(options.device)
        if device.type == "cuda":
            self.device = device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        self._writes = os.environ.get("RANK", "0") == "0"
        self.stopwatch = Stopwatch(device)
        self._began = time.monotonic()
        self._deadline: float = self._began + options.budget_seconds
        self._left: list[tuple[Workload, bool]] = []
        now = datetime.datetime.now(datetime.timezone.utc)
        clocks = self.stopwatch.monitor.describe()
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
        self.rows: list[Row] = []
        self.document |= {"rows": self.rows, "skipped": []}
        parts = [name, slug(self.document["device"]), f"{now:%Y-%m-%d}", slug(options.tag)]
        self.path: Path = options.out / ("-".join(part for part in parts if part) + ".json")

    def each(
        self, workloads: Iterable[Workload], is_over: Callable[[], bool] | None = None
    ) -> Iterator[tuple[Workload, bool]]:
        """Causal or not, as long as there is time; `finish` names in the file what is left."""
        self._left = [(workload, causal) for workload in workloads for causal in workload.causal]
        while self._left and not (is_over or self.is_late)():
            yield self._left[0]
            del self._left[0]
            self.write()

    def finish(self) -> None:
        for workload, causal in self._left:
            self.skip("not finished", workload=workload.name, causal=causal)
        if self._left:
            self.say(f"the time is up; not finished: {len(self._left)}")
        self.document["complete"] = not self._left
        self.write()

    def skip(self, reason: str, **what: Any) -> None:
        self.document["skipped"].append({**what, "reason": reason})

    def is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def check_time(self) -> None:
        """Raises OutOfTimeError."""
        if self.is_late():
            raise OutOfTimeError

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
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


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
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


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
