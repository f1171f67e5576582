"""Load of this machine: processors, memory, disk, network, and GPUs where NVIDIA's library is installed.

Rates are means since the last measurement. Shares are in percent, sizes in GB (10⁹ bytes), rates in MB/s (10⁶ bytes).
"""

import contextlib
import time
from types import ModuleType
from typing import Any

import psutil

try:
    import pynvml as found_nvml
except ImportError:  # the extra `gpu` of this package
    found_nvml = None
nvml: ModuleType | None = found_nvml


class MachineLoad:
    """Measurements of this machine. The first call of `measure` has means since the construction.

    `folder`: a path on the disk whose use is measured.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._gpus = _gpu_handles()
        self._time, self._counters = time.monotonic(), _counters()
        psutil.cpu_percent()  # begins the first interval

    def measure(self) -> dict[str, float]:
        """Return the values by name; those that this machine does not give are left out."""
        now, counters = time.monotonic(), _counters()
        seconds, before = max(now - self._time, 1e-9), self._counters
        self._time, self._counters = now, counters
        memory = psutil.virtual_memory()
        values = {
            "cpu_percent": psutil.cpu_percent(),
            "memory_used_gb": (memory.total - memory.available) / 1e9,
            "memory_percent": memory.percent,
        }
        values |= {f"{name}_mb_per_second": (counters[name] - before[name]) / seconds / 1e6 for name in counters}
        with contextlib.suppress(OSError):  # a folder that is not made yet
            disk = psutil.disk_usage(self.folder)
            values |= {"disk_percent": disk.percent, "disk_free_gb": disk.free / 1e9}
        for number, handle in enumerate(self._gpus):
            values |= {f"gpu_{number}_{name}": value for name, value in _gpu_values(handle).items()}
        return values


def _counters() -> dict[str, int]:
    """Bytes read from and written to disks, sent and received, since the machine was started."""
    disks, network = psutil.disk_io_counters(), psutil.net_io_counters()
    values = {"disk_read": disks.read_bytes, "disk_write": disks.write_bytes} if disks else {}
    return values | ({"network_sent": network.bytes_sent, "network_received": network.bytes_recv} if network else {})


def _gpu_handles() -> list[Any]:
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
        return [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:  # no driver, or a container without it
        return []


def _gpu_values(handle: Any) -> dict[str, float]:
    """Values of a GPU; one that it does not give, such as power in a part of a GPU, is left out."""
    assert nvml is not None
    values = {}
    readers = {
        "percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e9,
        "power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    }
    for name, read in readers.items():
        with contextlib.suppress(nvml.NVMLError):
            values[name] = float(read())
    return values
