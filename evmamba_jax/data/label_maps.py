"""Images with label maps: two folders of files with the same stems, read and checked."""

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from evmamba_jax.data.cases import Cases, Kind
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.dense_items import (
    UNREADABLE,
    Checked,
    Item,
    check_file,
    check_image,
    in_threads,
    why_unreadable,
)
from evmamba_jax.data.files import Folder
from evmamba_jax.errors import UserError

IGNORED = 255  # in a label map: the pixel counts for nothing
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_GREY, _RGB, _PALETTE = 0, 2, 3  # colour types of PNG

_NO_LABEL_MAP: Kind = "image has no label map", "images have no label map"
_NO_IMAGE: Kind = "label map has no image", "label maps have no image"
_SAME_STEM: Kind = "image has the stem of another", "images have the stems of others"
_BAD_LABELS: Kind = "label map cannot be read", "label maps cannot be read"
_WRONG_SIZE: Kind = "label map has another size than its image", "label maps have other sizes than their images"
_BAD_IDS: Kind = "label map has labels outside the list", "label maps have labels outside the list"

_ASIDE: Kind = "file is left out for its name's ending", "files are left out for their names' endings"
_ALL_IGNORED: Kind = "label map has only ignored pixels", "label maps have only ignored pixels"


@dataclasses.dataclass(frozen=True, slots=True)
class LabelMapItem(Item):
    """An image with its label map.

    Attributes:
        labels: the file of the label map.
        ignore_zero: whether label 0 is ignored and the others count from 1.
    """

    labels: Checked
    ignore_zero: bool

    @property
    def size(self) -> int:
        """Bytes that the record takes, but for small things."""
        return self.image.size + self.labels.size

    def identity(self) -> bytes:
        """Return what tells this item from every other."""
        return b"".join([Item.identity(self), self.labels.digest, bytes([self.ignore_zero])])

    def features(self) -> dict[str, bytes | int]:
        """Return the fields of the record; errors as for :meth:`Item.features`."""
        buffer = io.BytesIO()
        indices = class_indices(read_labels(self.labels.read()), self.ignore_zero)
        Image.fromarray(indices.astype(np.uint8)).save(buffer, "PNG")
        return {**Item.features(self), "label_map": buffer.getvalue()}


def read_labels(data: bytes) -> np.ndarray:
    """Read the labels of a PNG file as they stand in it.

    Of a palette the indices are read, not the colours; of grey the values, also where they have 1, 2, 4 or 16 bits; of
    RGB the grey value, where the three channels are equal.

    Args:
        data: the file.

    Returns:
        int32 (H, W).

    Raises:
        CorruptImageError: the bytes are no PNG, or cut short, or hold colours.
    """
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 26:
        raise CorruptImageError("not a PNG file")
    depth, colour = data[24], data[25]
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises errors of every kind
        raise CorruptImageError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if colour == _RGB and depth == 8 and (values == values[..., :1]).all():
        return values[..., 0].astype(np.int32)
    if colour not in (_GREY, _PALETTE) or values.ndim != 2:
        raise CorruptImageError("colours in place of labels: save it grey or with a palette")
    if colour == _GREY and 1 < depth < 8:
        values = values // (255 // (2**depth - 1))  # Pillow stretches such values to 0 to 255
    return values.astype(np.int32)


def class_indices(labels: np.ndarray, ignore_zero: bool) -> np.ndarray:
    """Return classes from 0 on, int32 of the same shape, with :data:`IGNORED` where a pixel counts for nothing.

    Args:
        labels: int32, as in the file.
        ignore_zero: whether label 0 is ignored and the others count from 1.
    """
    if not ignore_zero:
        return labels
    return np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)


def read_label_maps(
    images: Path,
    labels: Path,
    classes: tuple[str, ...],
    ignore_zero: bool,
    problems: Cases,
    findings: Cases,
) -> list[LabelMapItem]:
    """Read and check the images of one split.

    Args:
        images: their folder; folders in it are read too.
        labels: the folder of the PNG files with the same stems.
        classes: the names, in label order.
        ignore_zero: whether label 0 is ignored and the others count from 1.
        problems: takes what ends the preparation; the items are of use only where nothing came to it.
        findings: takes what is counted and said.

    Returns:
        The images in the order of their names.

    Raises:
        UserError: a folder is missing or holds no images.
    """
    pictures = _by_stem(images, _IMAGES, problems, findings)
    maps = _by_stem(labels, (".png",), problems, findings)
    for stem in sorted(pictures.keys() - maps.keys()):
        problems.add(_NO_LABEL_MAP, f"{images.name}/{pictures[stem]} (wanted: {labels.name}/{stem}.png)")
    for stem in sorted(maps.keys() - pictures.keys()):
        problems.add(_NO_IMAGE, f"{labels.name}/{maps[stem]}")
    both = sorted(pictures.keys() & maps.keys(), key=lambda stem: pictures[stem])
    items, pixels = [], np.zeros(len(classes), np.int64)
    check = functools.partial(_look, images, labels, pictures, maps, len(classes), ignore_zero)
    for stem, (item, counts, own) in zip(both, in_threads(check, both, f"checking {images.name}"), strict=True):
        for kind, name in own:
            problems.add(kind, name)
        if item is not None:
            items.append(item)
            pixels += counts
            if not counts.any():
                findings.add(_ALL_IGNORED, f"{labels.name}/{maps[stem]}")
    if items:
        for label in np.flatnonzero(pixels == 0):
            findings.add(("class has no pixel", "classes have no pixel"), f"{classes[label]} ({label})")
    return items


def _by_stem(folder: Path, endings: tuple[str, ...], problems: Cases, findings: Cases) -> dict[str, str]:
    """Return the names of the files with such endings, relative to the folder, by their stems."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name the folder of the files that end in {', '.join(endings)}")
    found: dict[str, str] = {}
    listed = Folder(folder).find()
    for name in listed.names:
        path = PurePosixPath(name)
        stem = str(path.with_suffix(""))
        if path.suffix.lower() not in endings:
            findings.add(_ASIDE, f"{folder.name}/{name}")
        elif stem in found:
            problems.add(_SAME_STEM, f"{folder.name}/{name} and {found[stem]}")
        else:
            found[stem] = name
    for name in listed.broken:
        problems.add(UNREADABLE, f"{folder.name}/{name} (a link that leads nowhere)")
    if not found:
        raise UserError(f"{folder} holds no files that end in {', '.join(endings)}")
    return found


Outcome = tuple[LabelMapItem | None, np.ndarray, list[tuple[Kind, str]]]


def _look(
    images: Path,
    labels: Path,
    pictures: Mapping[str, str],
    maps: Mapping[str, str],
    classes: int,
    ignore_zero: bool,
    stem: str,
) -> Outcome:
    """Check an image and its label map; return the item, the pixels of each class, and what is wrong."""
    wrong: list[tuple[Kind, str]] = []
    counts = np.zeros(256, np.int64)
    name = f"{labels.name}/{maps[stem]}"
    image_file = label_file = found = upright = None
    try:
        label_file, label_data = check_file(labels / maps[stem])
        found = read_labels(label_data)
    except (OSError, CorruptImageError) as error:
        wrong.append((_BAD_LABELS, f"{name} ({why_unreadable(error)})"))
    if found is not None:
        indices = class_indices(found, ignore_zero)
        strange = np.unique(found[(indices != IGNORED) & ((indices < 0) | (indices >= classes))]).tolist()
        if strange:
            some = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
            first = int(ignore_zero)
            allowed = f"{first} to {classes - 1 + first}" + (", 0" if ignore_zero else "") + f" and {IGNORED}"
            wrong.append((_BAD_IDS, f"{name} ({some}; allowed: {allowed})"))
        else:
            counts = np.bincount(indices.ravel(), minlength=256)
    height, width = (0, 0) if found is None else found.shape
    try:
        image_file, data = check_file(images / pictures[stem])
        upright = check_image(data, height, width)
        if upright is None and found is not None:
            wrong.append((_WRONG_SIZE, f"{name} ({width} x {height})"))
    except (OSError, CorruptImageError) as error:
        wrong.append((UNREADABLE, f"{images.name}/{pictures[stem]} ({why_unreadable(error)})"))
    if wrong or image_file is None or label_file is None or upright is None:
        return None, counts[:classes], wrong
    item = LabelMapItem(pictures[stem], image_file, height, width, upright, label_file, ignore_zero)
    return item, counts[:classes], wrong


def read_classes(file: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line in label order.

    Raises:
        UserError: the file cannot be read, or a line is empty or there twice, or there are more than 255.
    """
    lines = [line.strip() for line in _text(file).rstrip().splitlines()]
    for number, line in enumerate(lines):
        if not line or line in lines[:number]:
            what = "is empty" if not line else f"names {line!r} again"
            raise UserError(f"{file}: line {number + 1} {what}; every class is named once, one a line in label order")
    if not 1 <= len(lines) <= IGNORED:
        raise UserError(f"{file} names {len(lines)} classes; 1 to {IGNORED} are allowed")
    return tuple(lines)


def read_ade20k_classes(file: Path) -> tuple[str, ...]:
    """Read ADE20K's own list, a table with the columns ``Idx`` and ``Name`` between tabs.

    Raises:
        UserError: the file cannot be read or does not list the labels 1 to 150 in this order.
    """
    rows = list(csv.DictReader(io.StringIO(_text(file)), delimiter="\t", quoting=csv.QUOTE_NONE))
    numbers = [str(row.get("Idx")).strip() for row in rows]
    names = [str(row.get("Name") or "").strip() for row in rows]
    if numbers != [str(k + 1) for k in range(150)] or not all(names):
        raise UserError(
            f"{file} is not ADE20K's list: lines Idx, Ratio, Train, Val, Stuff, Name for 1 to 150 are needed"
        )
    return tuple(names)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}, the list of classes, cannot be read ({reason})") from error
