"""Clock and power of the GPU while something runs: from NVML if importable, else nvidia-smi."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

_SAMPLE_SECONDS = 0.02
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT; nvmlDeviceGetPowerUsage averages over a second


@dataclass(frozen=True, slots=True)
class Sample:
    """`at` is time.perf_counter(); None is "the driver did not say"."""

    at: float
    sm_mhz: float | None
    watts: float | None


def medians(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """(SM clock in MHz, power in W), each None where nothing was read."""
    clocks = [sample.sm_mhz for sample in samples if sample.sm_mhz is not None]
    watts = [sample.watts for sample in samples if sample.watts is not None]
    return (median(clocks) if clocks else None, median(watts) if watts else None)


class Monitor:
    """Reads nothing: for the CPU, and for machines that tell nothing."""

    is_fast = False  # a reading takes well under a launch, so it can be made while one runs

    def read(self) -> Sample:
        return Sample(time.perf_counter(), None, None)

    def describe(self) -> dict[str, Any]:
        return {}


class NvmlMonitor(Monitor):
    """Raises ImportError or an NVMLError where NVML can't be used."""

    is_fast = True

    def __init__(self, device: torch.device) -> None:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._nvml: Any = pynvml
        self._nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self) -> Sample:
        nvml = self._nvml
        clock = self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
        return Sample(time.perf_counter(), clock, self._watts())

    def _watts(self) -> float | None:
        with contextlib.suppress(Exception):  # fields are younger than NVML
            value = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_POWER_INSTANT])[0]
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1e3
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1e3

    def _ask(self, function: Any, *arguments: Any) -> float | None:
        try:
            return float(function(self._handle, *arguments))
        except self._nvml.NVMLError:
            return None

    def describe(self) -> dict[str, Any]:
        nvml = self._nvml
        driver = nvml.nvmlSystemGetDriverVersion()
        limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "max_sm_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "max_memory_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
            "power_limit_watts": None if limit is None else limit / 1e3,
        }


class SmiMonitor(Monitor):
    """One process of nvidia-smi a reading, hence slow."""

    def __init__(self, device: torch.device) -> None:
        if shutil.which("nvidia-smi") is None:
            raise FileNotFoundError("nvidia-smi is not there")
        self._uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def _query(self, fields: str) -> list[str]:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        command += ["-i", self._uuid]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return [part.strip() for part in done.stdout.split(",")] if done.returncode == 0 else []

    def read(self) -> Sample:
        values = [_number(text) for text in self._query("clocks.sm,power.draw")] or [None, None]
        return Sample(time.perf_counter(), values[0], values[-1])

    def describe(self) -> dict[str, Any]:
        names = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
        keys = ("driver", "max_sm_mhz", "max_memory_mhz", "power_limit_watts")
        values = self._query(",".join(names))
        return {
            key: value if key == "driver" else _number(value)
            for key, value in zip(keys, values, strict=False)
        }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def make_monitor(device: torch.device) -> Monitor:
    if device.type == "cuda":
        for kind in (NvmlMonitor, SmiMonitor):
            with contextlib.suppress(Exception):  # either is a convenience: times don't need it
                return kind(device)
    return Monitor()


@contextlib.contextmanager
def sampling(monitor: Monitor) -> Iterator[list[Sample]]:
    """Reads the monitor on a thread while the body runs; the samples are whole after it."""
    samples: list[Sample] = []
    if type(monitor) is Monitor:
        yield samples
        return
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            samples.append(monitor.read())

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
