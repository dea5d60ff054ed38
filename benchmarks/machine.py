"""Describe the machine that a benchmark runs on, for its results: processor, instruction sets and caches."""

import pathlib
import platform
import re
from collections.abc import Iterable
from importlib import metadata

from attn.functional.cpu import cores

# Flags of a processor that decide how fast, and in which order, products are summed.
_INSTRUCTION_SETS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def describe() -> dict:
    """Return name, model number, instruction sets, cores of this process and second-level cache.

    Unknown values are None, or an empty list.
    """
    info = _cpu_info()
    numbers = [info.get(name) for name in ("cpu family", "model")]
    flags = f"{info.get('flags', '')} {info.get('Features', '')}".split()  # of x86, and of Arm
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "family_and_model": "/".join(numbers) if all(numbers) else None,
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
        "cores": cores(),
        "l2_kib_per_core": _l2_kib(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None if not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _cpu_info() -> dict[str, str]:
    """Return the entries of /proc/cpuinfo for the first core; empty if that does not exist."""
    path = pathlib.Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0] if path.exists() else ""
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}


def _l2_kib() -> float | None:
    """Return the size of the second-level cache divided by the number of cores that share it."""
    for cache in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, size, shared = ((cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        except OSError:
            continue
        if level == "2" and (number := re.fullmatch(r"(\d+)([KM])", size)):
            spans = re.findall(r"(\d+)(?:-(\d+))?", shared)  # such as 0-1,4
            num_cores = sum(int(last or first) - int(first) + 1 for first, last in spans)
            return int(number[1]) * {"K": 1, "M": 1024}[number[2]] / max(1, num_cores)
    return None
