"""What a figure was measured on and with."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path


def today() -> str:
    """Return the date, as ISO 8601 has it."""
    return datetime.date.today().isoformat()


def processor() -> str:
    """Return the processor's name, and its logical cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []  # not Linux
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores"


def cpu() -> str:
    """Return the processor, its logical cores, and how busy it was already."""
    return f"{processor()}, {load()}"


def load() -> str:
    """Return how busy the machine is, in words."""
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # Windows does not say
    noise = " (other work was running: the times are noisy)" if busy > 0.5 else ""
    return f"load {busy:.1f} at the start{noise}"


def threads() -> int:
    """Return on how many logical cores this process may run, which is how many threads XLA computes with on a CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Return the bytes of memory that a program can still have; infinite where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * float(fields["MemAvailable"].split()[0])
    except (OSError, KeyError):
        return float("inf")  # not Linux: the program will tell


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed; of "Python" the one that runs."""
    found = {}
    for package in packages:
        try:
            found[package] = platform.python_version() if package == "Python" else metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
