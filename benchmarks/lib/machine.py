"""What a figure was measured on and with."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path


def today() -> str:
    return datetime.date.today().isoformat()


def cpu() -> str:
    """Return the processor, its logical cores, and how busy it was already."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    load = os.getloadavg()[0]
    noise = " (other work was running: the times are noisy)" if load > 0.5 else ""
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores, "
        f"load {load:.1f} at the start{noise}"
    )


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed; of "Python" that which runs."""
    found = {}
    for package in packages:
        try:
            found[package] = platform.python_version() if package == "Python" else metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
