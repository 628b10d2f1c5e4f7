"""Places as their user writes them, disks that may be full, programs that may be killed while they write."""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from evmamba_jax.errors import UserError

try:
    import fcntl
    import resource
except ImportError:  # Windows, which has no such limit
    fcntl = resource = None
    import msvcrt

OPEN_FILES = 128  # at a time: a save of the smallest model takes about half
OWNER = ".owner"  # in a work folder while a run is alive

# pathlib makes one slash of two.
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/{1,2}")


def is_bucket(place: str | os.PathLike[str]) -> bool:
    """Return whether a place is written as an address of something else than a file of this machine."""
    scheme = _SCHEME.match(os.fspath(place)) if isinstance(place, str | os.PathLike) else None
    return scheme is not None and scheme[1].lower() != "file"


def local(place: str | os.PathLike[str]) -> Path:
    """Return the one absolute path of a file or folder, in whatever form it is given.

    ``~``, ``..``, relative, with a slash at its end, by a symbolic link, or as ``file:///path``: the same folder has
    the same path, so that everything of a run lies together.

    Args:
        place: as its user writes it; it need not exist.

    Raises:
        UserError: a bucket or another address; no path at all.
    """
    if not isinstance(place, str | os.PathLike) or not isinstance(os.fspath(place), str) or not os.fspath(place):
        raise UserError(f"{place!r} is no file or folder: give its path")
    if is_bucket(place):
        address = _SCHEME.sub(r"\1://", os.fspath(place))
        raise UserError(
            f"{address} is not on a disk of this machine: give a path here, and copy from or to it yourself"
        )
    text = os.fspath(place)
    if _SCHEME.match(text):  # file:///path, or file:/path
        address = urlsplit(text)
        if address.netloc not in ("", "localhost"):
            raise UserError(f"{place} names the machine {address.netloc!r}: a path here begins with file:///")
        text = url2pathname(address.path)
    try:
        return Path(text).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, an unknown ~user, a NUL
        raise UserError(f"{text!r} is no path that can be followed: {error}") from error


def allow_open_files(count: int = OPEN_FILES) -> None:
    """Raise this process's limit of open files to a count, as far as the system lets it.

    Raises:
        UserError: it does not; what fails in a library then is told by none.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise UserError(
            f"this machine allows {hard} open files at a time, and a run takes {count} or more: allow more, e.g. with "
            "`ulimit -n 4096`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


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


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own a folder, which is made if missing, against every other process and thread of this machine.

    The system holds the lock, so it ends with its owner, however that dies. Where a file system has no locks, as some
    network disks, nothing is locked.

    Raises:
        UserError: somebody who is alive owns it; it cannot be made or written.
    """
    path = folder / OWNER
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    if file is None:
        raise UserError(
            f"the run in {folder} is still alive ({_owner(path)}): wait for its end or stop it, or choose another "
            "work folder"
        )
    try:
        with storage_errors(folder):
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            path.unlink()
        os.close(file)


def _locked(path: Path) -> int | None:
    """Return a file, open and locked; None where another has the lock."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _lock(file):
            os.close(file)
            return None
        # Its last owner may have removed it before the lock was free: then the name stands for another file, or none.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file; return False where another has the lock."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # pyrefly: ignore[missing-attribute]
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # else there are no locks here
    return True


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip() or "another process"
    return "another process"
