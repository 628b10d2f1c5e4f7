"""Runs ``train_tpu.py`` as its user does, in a process of its own, or for the time it saves in this one."""

import contextlib
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax

from evmamba_jax.training import loop
from evmamba_jax.training import mesh as meshes
from train_tpu import main

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "tests" / "training" / "tiny.py")


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Return the environment of a user with CPU devices: one, as most have; several share two cores and take longer."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", kept["XLA_FLAGS"])
    return kept | {"XLA_FLAGS": flags} | more


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


def on_devices(count: int) -> contextlib.AbstractContextManager:
    """Let runs in this process have the first of its devices only."""
    fewer = functools.partial(meshes.make_mesh, described=jax.devices()[:count])
    return mock.patch.object(meshes, "make_mesh", fewer)


def run_here(*arguments: object, config: str = TINY, devices: int = 1, pictures: bool = False) -> tuple[int, str, str]:
    """Run the command in this process, on some of its devices; return exit code, stdout and stderr.

    Pictures take longer than all else that a small run does: they are drawn where they are looked at.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for context in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), on_devices(devices)):
            stack.enter_context(context)
        if not pictures:
            stack.enter_context(mock.patch.object(loop, "_draw"))
        code = main(["train_tpu.py", "--config", str(ROOT / config), *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def refused_here(*arguments: object, config: str = TINY, devices: int = 1) -> str:
    """Run the command in this process, check that it is refused in one line, and return the line."""
    code, out, err = run_here(*arguments, config=config, devices=devices)
    assert code == 2, out + err
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line
