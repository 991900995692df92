"""Clock and power of the GPU while something runs, from NVML (pynvml)."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch

_SAMPLE_SECONDS = 0.02
_POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT; nvmlDeviceGetPowerUsage averages over a second


class Sample(NamedTuple):
    """`at` is time.perf_counter(); None is "the driver did not say"."""

    at: float
    sm_mhz: float | None
    watts: float | None


def medians(samples: Sequence[Sample]) -> tuple[float | None, float | None]:
    """(SM clock in MHz, power in W), each None where nothing was read."""
    clocks, watts = (
        [value for sample in samples if (value := getattr(sample, name)) is not None]
        for name in ("sm_mhz", "watts")
    )
    return (median(clocks) if clocks else None, median(watts) if watts else None)


class Monitor:
    """Reads nothing on a CPU, and where NVML can't be used: times don't need it."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        if device.type == "cuda":
            with contextlib.suppress(Exception):
                import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

                pynvml.nvmlInit()
                uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                self._nvml = pynvml

    def read(self, samples: list[Sample]) -> None:
        """Adds one, in well under a launch's time."""
        if self._nvml is not None:
            clock = self._ask("ClockInfo", self._nvml.NVML_CLOCK_SM)
            samples.append(Sample(time.perf_counter(), clock, self._watts()))

    @contextlib.contextmanager
    def sampling(self) -> Iterator[list[Sample]]:
        """Reads on a thread while the body runs; the samples are whole after it."""
        samples: list[Sample] = []
        stop = threading.Event()

        def loop() -> None:
            while self._nvml is not None and not stop.wait(_SAMPLE_SECONDS):
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
        return self._ask("PowerUsage", scale=1e-3)

    def _ask(self, what: str, *arguments: Any, scale: float = 1.0) -> float | None:
        try:
            function = getattr(self._nvml, f"nvmlDeviceGet{what}")
            return float(function(self._handle, *arguments)) * scale
        except self._nvml.NVMLError:
            return None

    def describe(self) -> dict[str, Any]:
        """The driver, and the limits of clocks and power."""
        if self._nvml is None:
            return {}
        driver = self._nvml.nvmlSystemGetDriverVersion()
        return {
            "driver": driver.decode() if isinstance(driver, bytes) else driver,
            "max_sm_mhz": self._ask("MaxClockInfo", self._nvml.NVML_CLOCK_SM),
            "max_memory_mhz": self._ask("MaxClockInfo", self._nvml.NVML_CLOCK_MEM),
            "power_limit_watts": self._ask("EnforcedPowerLimit", scale=1e-3),
        }
