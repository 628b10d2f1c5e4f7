"""How every command begins and ends: what it may print, which devices it looks for, its exit code."""

import argparse
import importlib.util
import io
import os
import select
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from evmamba_jax.errors import UserError

_DEVICES = Path("/dev")
_CLOSED_PIPE = 141  # what a shell calls the end of a program whose reader has gone: 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """A parser of arguments that tells a mistake in one line; parse inside :func:`main`."""

    def error(self, message: str):
        """Raise a UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def main(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    What the terminal cannot show is printed as an escape. Where no TPU is, JAX does not look for one.

    Returns:
        What ``command`` returns (None is 0); 2 for a user's mistake, told as ``error: ...``; 130 after Ctrl-C, told as
        ``interrupted``; 141, silently, where nobody reads the output any more, as in ``... | head -1``. A
        ``SystemExit``, such as argparse's after ``--help``, goes its way.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _leave_out_absent_tpu()
    try:
        try:
            code = _run(command)
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, not when Python ends, it shows whether somebody still reads
        return code
    except BrokenPipeError:
        if not _stop_printing():
            raise  # another pipe than ours
        return _CLOSED_PIPE


def _run(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "evmamba_jax", "pallas_kernels"):
            raise
        print(f"error: {_missing(package)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _missing(package: str) -> str:
    """Return what to say where a package is not installed."""
    if package == "array_record" and sys.platform == "win32":
        return "data sets are read with array_record, which there is not for Windows: use Linux, macOS or WSL"
    return f"{package} is needed here and not installed: install evmamba-jax again in this environment"


def _stop_printing() -> bool:
    """Return whether the reader of one of our streams has gone; what is left for it then goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and hasattr(select, "poll"):  # Windows has none
            watch = select.poll()
            watch.register(stream.fileno(), 0)  # for no event but the end of the other side
            if watch.poll(0):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


def _leave_out_absent_tpu() -> None:
    """Keep JAX from asking libtpu, which the extras test and preflight install for its compiler, where no TPU is.

    libtpu would print errors about the TPU's host before the command's own first line.
    """
    is_there = [*_DEVICES.glob("accel*"), *_DEVICES.glob("vfio/[0-9]*")]  # up to v4, and from v5e on
    if is_there or "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if entry_points(group="jax_plugins"):  # another accelerator, which JAX is to find: libtpu fails without a word
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # which has read the environment already
        import jax

        jax.config.update("jax_platforms", "cpu")
