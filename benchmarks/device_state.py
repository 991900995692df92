"""Clock and power of the GPU while something runs, from NVML where it can be imported."""

from __future__ import annotations

import contextlib
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

    def read(self, samples: list[Sample]) -> None:
        """Adds one, in well under a launch's time."""

    def describe(self) -> dict[str, Any]:
        """The driver, and the limits of clocks and power."""
        return {}

    def sampling(self) -> contextlib.AbstractContextManager[list[Sample]]:
        """Reads on a thread while the body runs; the samples are whole after it."""
        return contextlib.nullcontext([])


class NvmlMonitor(Monitor):
    """Raises ImportError or an NVMLError where NVML can't be used."""

    def __init__(self, device: torch.device) -> None:
        import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

        self._nvml: Any = pynvml
        self._nvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")

    def read(self, samples: list[Sample]) -> None:
        nvml = self._nvml
        clock = self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)
        samples.append(Sample(time.perf_counter(), clock, self._watts()))

    @contextlib.contextmanager
    def sampling(self) -> Iterator[list[Sample]]:
        samples: list[Sample] = []
        stop = threading.Event()

        def loop() -> None:
            while not stop.wait(_SAMPLE_SECONDS):
                self.read(samples)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield samples
        finally:
            stop.set()
            thread.join()

    def _watts(self) -> float | None:
        with contextlib.suppress(Exception):  # fields are younger than NVML
            value = self._nvml.nvmlDeviceGetFieldValues(self._handle, [_POWER_INSTANT])[0]
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1e3
        return self._ask(self._nvml.nvmlDeviceGetPowerUsage, scale=1e-3)

    def _ask(self, function: Any, *arguments: Any, scale: float = 1.0) -> float | None:
        try:
            return float(function(self._handle, *arguments)) * scale
        except self._nvml.NVMLError:
            return None

    def describe(self) -> dict[str, Any]:
        nvml = self._nvml
        driver = nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "max_sm_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
            "max_memory_mhz": self._ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_MEM),
            "power_limit_watts": self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, scale=1e-3),
        }


def make_monitor(device: torch.device) -> Monitor:
    if device.type == "cuda":
        with contextlib.suppress(Exception):  # a convenience: times don't need it
            return NvmlMonitor(device)
    return Monitor()
