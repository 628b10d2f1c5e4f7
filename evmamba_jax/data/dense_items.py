"""One image of a data set with boxes or label maps, checked and ready to be written."""

import abc
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from evmamba_jax.data.cases import Kind
from evmamba_jax.data.decoding import CorruptImageError, decode
from evmamba_jax.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

MISSING: Kind = "image file is missing", "image files are missing"
UNREADABLE: Kind = "image cannot be read", "images cannot be read"
_TOGETHER = 256  # images that are looked at before more are asked for


class Checked(NamedTuple):
    """A file as it was when it was checked.

    Attributes:
        path: where it lies.
        size: bytes.
        digest: SHA-256 of its content, 32 bytes.
    """

    path: Path
    size: int
    digest: bytes

    def read(self) -> bytes:
        """Return the file's bytes.

        Raises:
            UserError: the file has changed since it was checked.
        """
        data = self.path.read_bytes()
        if hashlib.sha256(data).digest() != self.digest:
            raise UserError(f"{self.path} has changed since it was checked: prepare again")
        return data


@dataclasses.dataclass(frozen=True, slots=True)
class Item(abc.ABC):
    """One image; the kinds of data sets add their own.

    Attributes:
        id: its file name, relative to the folder of the images.
        image: the file.
        height: of the image as its boxes or labels count it, pixels.
        width: the same.
        upright: whether that is the image as its EXIF data turn it, see :func:`check_image`.
    """

    id: str
    image: Checked
    height: int
    width: int
    upright: bool

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Bytes that the record takes, but for small things."""

    def identity(self) -> bytes:
        """Return what tells this item from every other: contents, not places and times."""
        return f"{self.id}\0{self.height} {self.width} {self.upright}\0".encode() + self.image.digest

    def features(self) -> dict[str, bytes | int]:
        """Return the fields of the record.

        Raises:
            UserError: a file has changed since it was checked.
        """
        return {"image": self.image.read(), "id": self.id.encode(), "upright": int(self.upright)}


def check_file(path: Path) -> tuple[Checked, bytes]:
    """Read a file; return what is known of it, and its bytes.

    Raises:
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    return Checked(path, len(data), hashlib.sha256(data).digest()), data


def check_image(data: bytes, height: int, width: int) -> bool | None:
    """Decode an image and compare its size with that of its annotations.

    The rule: OpenCV, and so the official code, turns an image as its EXIF data say. Where the annotations have the
    turned size, the image is read so. Where they have only the size before the turn, it is read without.

    Args:
        data: the file.
        height: that the annotations give, pixels.
        width: the same.

    Returns:
        Whether the image is to be read upright, as ``decode(..., upright=)`` takes it; None where neither size fits.

    Raises:
        CorruptImageError: the file cannot be decoded.
    """
    for upright in (True, False):
        if decode(data, 3, upright=upright).shape[:2] == (height, width):
            return upright
    return None


def in_threads(function: Callable[[T], R], tasks: Sequence[T], title: str) -> Iterator[R]:
    """Call a function for every task, in threads and with a progress bar; return the results in order."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(tasks), desc=title, unit=" images", mininterval=1.0, leave=False) as progress,
    ):
        for start in range(0, len(tasks), _TOGETHER):
            for result in pool.map(function, tasks[start : start + _TOGETHER]):
                yield result
                progress.update()


def why_unreadable(error: OSError | CorruptImageError) -> str:
    """Return in a few words why a file cannot be read."""
    return getattr(error, "strerror", None) or str(error)
