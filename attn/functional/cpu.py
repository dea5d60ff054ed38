"""The number of CPU cores that this process may use."""

import os
import pathlib


def cores(quota: pathlib.Path = pathlib.Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Count the CPU cores that this process may use: its affinity, and its container's quota if there is one.

    Args:
      quota: file of the container's quota, "LIMIT PERIOD" in microseconds or "max PERIOD".

    Returns:
      At least 1; a quota is rounded down, so that 1.5 cores count as 1.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota.exists():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            available = min(available, max(1, int(limit) // int(period)))
    return available
