"""What every file of a data set is: its size, the hash of its content, and whether it is an image; kept on disk.

An index of a million files loads in a second. Files are read again only where names, sizes or times have changed.
"""

import contextlib
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evmamba_jax.data.decoding import looks_like_image
from evmamba_jax.data.files import Files, Found, Strings
from evmamba_jax.errors import UserError
from evmamba_jax.storage import written_whole

IMAGE, OTHER, UNREADABLE = range(3)
_VERSION = 1
_TOGETHER = 256  # files that a thread reads before it asks for more
_COMPARED = 100_000  # up to so many files in a folder, size and time of each are compared, too
_SNIFFED = 4096  # bytes


class Index(NamedTuple):
    """The files of a place.

    Attributes:
        found: names, sizes and places.
        digests: uint8 (N, 16), the first half of SHA-256 of the content.
        kinds: uint8 (N,): IMAGE, OTHER or UNREADABLE.
    """

    found: Found
    digests: np.ndarray
    kinds: np.ndarray

    def halves(self) -> np.ndarray:
        """Return the digests as uint64 (N, 2)."""
        return self.digests.view(np.uint64).reshape(-1, 2)


def open_index(files: Files, work: Path | None = None) -> Index:
    """Return the index of a place, made or brought up to date where needed.

    Args:
        files: the place.
        work: a folder that keeps the index where the place cannot; not given, it is then made anew every time.
    """
    homes = [files.home] + ([work / f"{_name_of(files.place)}.npz"] if work else [])
    for home in homes:
        known = _load(home)
        if known is None:
            continue
        if files.stamp(known.found.stamp) == known.found.stamp and not _touched(files, known):
            return known
        index = _make(files, known)
        break
    else:
        index = _make(files, None)
    for home in homes:
        with contextlib.suppress(UserError, OSError):  # a disk that cannot be written on; the next home may be
            home.parent.mkdir(parents=True, exist_ok=True)
            _save(home, index)
            break
    return index


def _name_of(place: Path) -> str:
    return f"index-{place.name}-{hashlib.sha256(str(place).encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def _touched(files: Files, known: Index) -> bool:
    """Return whether one of the files, where they are not too many to look at, has another size or time."""
    if not files.place.is_dir() or len(known.kinds) > _COMPARED:
        return False
    for name, size, where in zip(known.found.names, known.found.sizes, known.found.where, strict=True):
        try:
            about = os.stat(files.place / name)
        except OSError:
            return True
        if (about.st_size, about.st_mtime_ns) != (size, where[0]):
            return True
    return False


def _make(files: Files, known: Index | None) -> Index:
    found = files.find()
    count = len(found.names)
    digests, kinds = np.zeros((count, 16), np.uint8), np.full(count, UNREADABLE, np.uint8)
    todo = np.arange(count)
    if known is not None:
        rows = {name: i for i, name in enumerate(known.found.names)}
        old = np.array([rows.get(name, -1) for name in found.names], np.int64).reshape(-1)
        same = (
            (old >= 0)
            & (known.found.sizes[old] == found.sizes)
            & (known.found.where[old] == found.where).all(1)
            & (known.kinds[old] != UNREADABLE)
            if len(rows)
            else np.zeros(count, bool)
        )
        digests[same], kinds[same] = known.digests[old[same]], known.kinds[old[same]]
        todo = np.flatnonzero(~same)
    if len(todo) > 20_000:
        print(f"listing {len(todo):,} files of {files.place}", file=sys.stderr, flush=True)

    names = list(found.names)

    def look(part: np.ndarray) -> None:
        for i in part.tolist():
            try:
                data = files.read(names[i], found.where[i])
            except Exception:  # no right to read, a bad disk, a damaged archive: zlib and struct have their own kinds
                continue
            digests[i] = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint8)
            kinds[i] = IMAGE if looks_like_image(data[:_SNIFFED]) else OTHER

    # Threads wait for disks and hash side by side; more of them only take the interpreter from one another.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(look, np.array_split(todo, max(1, len(todo) // _TOGETHER))))
    return Index(found, digests, kinds)


def _save(home: Path, index: Index) -> None:
    found = index.found
    with written_whole(home) as file, open(file, "wb") as out:
        np.savez(
            out,
            version=_VERSION,
            names=found.names.blob,
            ends=found.names.ends,
            sizes=found.sizes,
            where=found.where,
            stamp=_text(found.stamp),
            empty=_text("\n".join(found.empty)),
            broken=_text("\n".join(found.broken)),
            digests=index.digests,
            kinds=index.kinds,
        )


def _load(home: Path) -> Index | None:
    """Return a kept index; None where there is none, or only a damaged or older one."""
    try:
        with np.load(home, allow_pickle=False) as file:
            if file["version"] != _VERSION:
                return None
            names = Strings(file["names"], file["ends"])
            lines = [tuple(filter(None, _told(file[name]).split("\n"))) for name in ("empty", "broken")]
            found = Found(names, file["sizes"], file["where"], _told(file["stamp"]), *lines)
            return Index(found, file["digests"], file["kinds"])
    except Exception:  # NumPy and zipfile raise errors of every kind on damaged files
        return None


def _text(string: str) -> np.ndarray:
    return np.frombuffer(string.encode("utf-8", "surrogateescape"), np.uint8)


def _told(array: np.ndarray) -> str:
    return array.tobytes().decode("utf-8", "surrogateescape")
