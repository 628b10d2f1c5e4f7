"""How every command ends: its exit code, and one line where something is wrong."""

import errno
import re
import sys
from collections.abc import Callable, Iterator

from evmamba_jax.errors import UserError

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


def main(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code.

    Returns:
        What ``command`` returns (None is 0); 2 for a user's mistake or what the machine refuses, told as
        ``error: ...``; 130 after Ctrl-C, told as ``interrupted``. A ``SystemExit``, such as argparse's, goes its way.
    """
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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
