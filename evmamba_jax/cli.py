"""How every command begins and ends: what it may print, which devices it looks for, its exit code."""

import argparse
import errno
import importlib
import importlib.util
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from evmamba_jax.errors import UserError, nearest

_DEVICES = Path("/dev")
_CLOSED_PIPE = 141  # what a shell calls the end of a program whose reader has gone: 128 + SIGPIPE

# What a machine refuses to any program, by the words that systems and libraries have for it, and what to do then.
_LIMITS = {
    "too many open files": "this machine allows too few open files at a time: allow more, e.g. with `ulimit -n 4096`",
    "can't start new thread|resource temporarily unavailable": (
        "this machine allows too few threads and processes: allow more, e.g. with `ulimit -u 4096`, or lower "
        "data.num_threads and data.num_workers"
    ),
    "cannot allocate memory|unable to allocate|out of memory|bad_alloc|memoryerror": (
        "there is not enough memory: lower batch_size, raise accumulation, or end other programs"
    ),
    "no usable temporary directory": "there is no folder for temporary files: set TMPDIR to one that is yours",
    "no space left on device|disk quota exceeded": "the disk is full: make room",
    "file too large": "this machine allows no larger files: allow them, e.g. with `ulimit -f unlimited`",
}
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)  # told with the file that they are about


class Parser(argparse.ArgumentParser):
    """A parser of arguments that tells a mistake in one line; parse inside :func:`main`."""

    def error(self, message: str):
        """Raise a UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def subcommand(
    argv: Sequence[str], prog: str, commands: Mapping[str, tuple[str, str]], *, description: str, version: str = ""
) -> int:
    """Run the subcommand that ``argv`` names, inside :func:`main`; alone, show which there are.

    Args:
        argv: the name of a subcommand, and its arguments.
        prog: what the help calls the command.
        commands: by name the module whose ``main(argv, prog)`` it is, and what it does.
        description: of all of it.
        version: what ``--version`` prints; empty where there is no such option.

    Returns:
        Its exit code; 2 where ``argv`` names none.

    Raises:
        UserError: an unknown name.
    """
    if argv and argv[0] in commands:
        module, _ = commands[argv[0]]
        return importlib.import_module(module).main(list(argv[1:]), prog=f"{prog} {argv[0]}")
    width = max(map(len, commands)) + 2
    listed = "\n".join(f"  {name:<{width}}{does}" for name, (_, does) in commands.items())
    parser = Parser(
        prog=prog,
        usage="%(prog)s COMMAND ...",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listed}\n\n{prog} COMMAND --help says more of each.",
    )
    if version:
        parser.add_argument("--version", action="version", version=version)
    _, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"unknown command {rest[0]!r}{nearest(rest[0], commands)}; allowed: {', '.join(commands)}")
    parser.print_help()
    return 2


def main(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    What the terminal cannot show is printed as an escape. Where no TPU is, JAX does not look for one.

    Returns:
        What ``command`` returns (None is 0); 2 for a user's mistake or what the machine refuses, told as
        ``error: ...``; 130 after Ctrl-C, told as ``interrupted``; 141, silently, where nobody reads the output, as in
        ``... | head -1``. A ``SystemExit``, such as argparse's after ``--help``, goes its way.
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
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def _refusal(error: BaseException) -> str | None:
    """Return what the machine refused and what to do, in a line; None for any other error."""
    for cause in _causes(error):
        text = f"{type(cause).__name__}: {cause}"
        for words, told in _LIMITS.items():
            found = re.search(words, text, re.IGNORECASE)
            if found:
                file = getattr(cause, "filename", None)
                return told + (f" ({file})" if file else "")
        if isinstance(cause, OSError) and cause.errno in _REFUSALS and cause.filename:
            return f"{cause.filename} cannot be used: {cause.strerror}"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing(package: str) -> str:
    """Return what to say where a package is not installed."""
    if package == "array_record" and sys.platform == "win32":
        return "TFDS data sets are read with array_record, which there is not for Windows: use Linux, macOS or WSL"
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
