"""Where the files of a data set lie: a folder, a zip or a tar. Names are relative, with ``/``; bytes come by name."""

import dataclasses
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from evmamba_jax.errors import UserError

LARGEST = 1 << 31  # bytes; nothing so long is a picture, and a zip can promise any length
_PART = 1 << 18  # bytes that are read at a time
_BINARY = getattr(os, "O_BINARY", 0)  # Windows tells text from bytes
# Files that programs leave behind, beside those whose names begin with a dot.
_LEFT_BEHIND = ("__MACOSX", "Thumbs.db", "desktop.ini")


class Strings(Sequence[str]):
    """Many strings in one array of bytes: a million take a moment to load, and as much memory as their letters."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        """Pack strings; file names may hold bytes that are no text."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        ends = np.cumsum([len(one) for one in encoded], dtype=np.int64) if encoded else np.zeros(0, np.int64)
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = int(self.ends[index - 1]) if index else 0
        return self.blob[start : int(self.ends[index])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data, start = self.blob.tobytes(), 0
        for end in self.ends.tolist():
            yield data[start:end].decode("utf-8", "surrogateescape")
            start = end


class Found(NamedTuple):
    """What a place holds.

    Attributes:
        names: of the files, sorted.
        sizes: int64 (N,), bytes.
        where: int64 (N, 3): what :meth:`Files.read` needs beside the name; it differs where a file was changed.
        stamp: differs where files were added, removed or renamed, and is cheap to take again.
        empty: folders without a file.
        broken: links that lead nowhere.
    """

    names: Strings
    sizes: np.ndarray
    where: np.ndarray
    stamp: str
    empty: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


class Files(Protocol):
    """Random access to the files of one place."""

    @property
    def place(self) -> Path:
        """The folder or archive."""
        ...

    @property
    def home(self) -> Path:
        """Where an index is best kept."""
        ...

    def stamp(self, known: str) -> str:
        """Return the stamp as it is now; ``known`` is an earlier one, which may say where to look."""
        ...

    def find(self) -> Found:
        """List all files."""
        ...

    def read(self, name: str, where: np.ndarray) -> bytes:
        """Return a file's bytes. Raises OSError, or what a damaged archive gives."""
        ...


def open_files(place: Path) -> Files:
    """Open a folder, a zip or a tar.

    Raises:
        UserError: it is missing, or of another kind.
    """
    if place.is_dir():
        return Folder(place)
    if not place.exists():
        raise UserError(f"data.data_dir={str(place)!r} does not exist: name a folder, a zip or a tar with pictures")
    if zipfile.is_zipfile(place):
        return Zip(place)
    try:
        with tarfile.open(place, "r:"):
            return Tar(place)
    except (tarfile.TarError, OSError) as error:
        with open(place, "rb") as file:
            packed = file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        hint = "a compressed tar has no random access: unpack it, or decompress it to a plain .tar" if packed else ""
        raise UserError(f"data.data_dir={str(place)!r} is no folder, zip or tar; {hint or error}") from error


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder on a disk; links are followed."""

    place: Path

    @property
    def home(self) -> Path:
        """A hidden file in the folder."""
        return self.place / ".evmamba-index.npz"

    def stamp(self, known: str) -> str:
        """Return the times at which the known folders were last changed; the first line is about the place itself."""
        folders = [line.partition("\t")[0] for line in known.split("\n")[1:]]
        return _stamp_of(self.place, folders)

    def find(self) -> Found:
        """Walk the folder."""
        files: dict[str, tuple] = {}
        folders, empty, broken = [], [], []
        stack: list[tuple[str, tuple]] = [("", ())]
        while stack:
            folder, above = stack.pop()
            path = self.place / folder
            about = path.stat()
            here = (about.st_dev, about.st_ino)
            if here in above:
                continue  # a link to a folder around it
            entries = [entry for entry in os.scandir(path) if not is_left_behind(entry.name)]
            if folder:
                folders.append(folder)
                empty += [] if entries else [folder]
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                try:
                    if entry.is_dir():
                        stack.append((name, (*above, here)))
                        continue
                    found = entry.stat()
                except OSError:
                    broken.append(name)
                    continue
                if stat.S_ISREG(found.st_mode):
                    files[name] = (found.st_size, found.st_mtime_ns, 0, 0)
                else:
                    broken.append(name)
        return _found(files, _stamp_of(self.place, sorted(folders)), empty, broken)

    def read(self, name: str, where: np.ndarray) -> bytes:
        """Read the file; with three calls of the system, a file object takes twice as many."""
        file = os.open(f"{self.place}/{name}" if not os.path.isabs(name) else name, os.O_RDONLY | _BINARY)
        try:
            parts = [os.read(file, _PART)]
            while len(parts[-1]) == _PART:
                parts.append(os.read(file, _PART))
        finally:
            os.close(file)
        return b"".join(parts) if len(parts) > 1 else parts[0]


@dataclasses.dataclass(frozen=True)
class Listed(Folder):
    """Files that a table names: relative to the folder that it lies in, or absolute."""

    names: tuple[str, ...]
    table: Path

    @property
    def home(self) -> Path:
        """A hidden file beside the table."""
        return _beside(self.table)

    def stamp(self, known: str) -> str:
        """Return the times at which the table and the folders that it names were last changed."""
        times: dict[str, int | None] = {}
        for folder in sorted({os.path.dirname(name) for name in self.names}):
            try:
                times[folder] = os.stat(self.place / folder).st_mtime_ns if folder else 0
            except OSError:
                times[folder] = None
        return "\n".join([str(os.stat(self.table).st_mtime_ns), *(f"{name}\t{time}" for name, time in times.items())])

    def find(self) -> Found:
        """Look for each of the files."""
        files, broken = {}, []
        for name in self.names:
            try:
                about = os.stat(self.place / name)
            except OSError:
                continue  # the listing says which
            if stat.S_ISREG(about.st_mode):
                files[name] = (about.st_size, about.st_mtime_ns, 0, 0)
            else:
                broken.append(name)
        return _found(files, self.stamp(""), broken=broken)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.evmamba-index.npz")


def _stamp_of(place: Path, folders: Sequence[str]) -> str:
    # Of the place itself the names count, not the time: the index may be kept there.
    lines = ["\0".join(sorted(name for name in os.listdir(place) if not is_left_behind(name)))]
    for folder in folders:
        try:
            lines.append(f"{folder}\t{os.stat(place / folder).st_mtime_ns}")
        except OSError:
            lines.append(f"{folder}\tgone")
    return "\n".join(lines)


class _Archive:
    def __init__(self, place: Path):
        self.place = place

    @property
    def home(self) -> Path:
        """A hidden file beside the archive."""
        return _beside(self.place)

    def stamp(self, known: str) -> str:
        """Return length and time of the archive."""
        about = self.place.stat()
        return f"{about.st_size} {about.st_mtime_ns}"

    def _part(self, offset: int, size: int) -> bytes:
        with open(self.place, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{self.place} ends before the file does")
        return data


class Tar(_Archive):
    """A plain tar."""

    def find(self) -> Found:
        """List its files, and where each begins."""
        files: dict[str, tuple] = {}  # of two with one name the later counts
        try:
            with tarfile.open(self.place, "r:") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    if member.isfile() and not _hidden(name):
                        files[name] = (member.size, member.offset_data, 0, member.size)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"{self.place} is a damaged tar ({error}); copy or make it again") from error
        return _found(files, self.stamp(""))

    def read(self, name: str, where: np.ndarray) -> bytes:
        """Read the part of the tar that is the file."""
        return self._part(int(where[0]), int(where[2]))


class Zip(_Archive):
    """A zip whose files are stored or deflated."""

    def find(self) -> Found:
        """List its files, and where each begins."""
        files: dict[str, tuple] = {}  # of two with one name the later counts
        try:
            with zipfile.ZipFile(self.place) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{self.place} is a damaged zip ({error}); copy or make it again") from error
        for member in members:
            if member.is_dir() or _hidden(member.filename):
                continue
            if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"{member.filename} in {self.place} is encrypted, or packed otherwise than stored or deflated: "
                    "unpack the zip"
                )
            deflated = member.compress_type == zipfile.ZIP_DEFLATED
            files[member.filename] = (member.file_size, member.header_offset, deflated, member.compress_size)
        return _found(files, self.stamp(""))

    def read(self, name: str, where: np.ndarray) -> bytes:
        """Read and unpack the file."""
        offset, deflated, packed = map(int, where)
        head = self._part(offset, 30)
        if head[:4] != b"PK\3\4":
            raise OSError(f"{self.place} has changed")
        data = self._part(offset + 30 + sum(struct.unpack("<HH", head[26:30])), packed)
        return zlib.decompressobj(-15).decompress(data, LARGEST) if deflated else data


def _found(files: dict[str, tuple], stamp: str, empty: Sequence[str] = (), broken: Sequence[str] = ()) -> Found:
    names = sorted(files)
    table = np.asarray([files[name] for name in names], np.int64).reshape(-1, 4)
    return Found(Strings.of(names), table[:, 0], table[:, 1:], stamp, tuple(sorted(empty)), tuple(sorted(broken)))


def is_left_behind(name: str) -> bool:
    """Return whether a file or folder of this name is no part of a data set: hidden, or a program's own."""
    return name.startswith(".") or name in _LEFT_BEHIND


def _hidden(path: str) -> bool:
    return any(is_left_behind(part) for part in path.split("/") if part != ".")
