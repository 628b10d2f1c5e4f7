"""Runs ``train_tpu.py`` as its user does: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "training" / "tiny.py")


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Return the environment of a user with CPU devices, but for the compiler: it is asked for speed of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    flags = [flag for flag in kept.pop("XLA_FLAGS").split() if "device_count" not in flag]
    flags += ["--xla_backend_optimization_level=0", f"--xla_force_host_platform_device_count={devices}"]
    return kept | {"XLA_FLAGS": " ".join(flags)} | more


def start(*arguments: object, config: str = TINY, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start the command; stdout and stderr are pipes of text."""
    command = [sys.executable, str(ROOT / "train_tpu.py"), "--config", config, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env or environment(), cwd=ROOT
    )


def run(*arguments: object, config: str = TINY, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Run the command to its end; return exit code, stdout and stderr."""
    with start(*arguments, config=config, env=env) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err
