"""Files on disks that may be full, and programs that may be killed while they write them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from evmamba_jax.errors import UserError


@contextlib.contextmanager
def storage_errors(directory: os.PathLike) -> Iterator[None]:
    """Turn a full or unwritable file system into one line; TensorStore reports it as text in a ValueError."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else None
        if reason is None:
            known = "No space left on device|Disk quota exceeded|File too large|Permission denied|Read-only file system"
            found = re.search(known, str(error))
            if found is None:
                raise
            reason = found.group()
        raise UserError(
            f"cannot write in {directory} ({reason}): make room or give the right to write there, "
            "or choose another work folder"
        ) from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write, which then takes its place in one move: ``path`` is never half a file.

    Raises:
        UserError: the folder is full or not writable.
    """
    beside = path.with_name(f"{path.name}.tmp")
    with storage_errors(path.parent):
        try:
            yield beside
            beside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
