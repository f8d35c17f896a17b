"""How much memory the run has needed."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol


class Device(Protocol):
    """What of a `jax.Device` is used here."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """The allocator's statistics, None where it keeps none."""
        ...


def device_memory_bytes(devices: Sequence[Device]) -> dict[str, int]:
    """Peak memory so far: of the fullest device, or of this process where devices do not tell.

    Args:
        devices: this process's devices.

    Returns:
        `{"device_memory_bytes": ...}`, the highest `peak_bytes_in_use` of the devices; for CPU
        devices, which keep no statistics, `{"host_memory_bytes": ...}`, the process's peak resident
        set (data pipeline and compiler included).
    """
    stats = [device.memory_stats() for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return {"device_memory_bytes": max(peaks)}
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def host_bytes() -> int:
    """Bytes of this host's memory, taken or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
