"""Images with boxes from a JSON file in COCO's format: read, checked, and what cannot be used counted."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.data.cases import Cases, Kind
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.dense_items import (
    MISSING,
    UNREADABLE,
    Checked,
    Item,
    check_file,
    check_image,
    in_threads,
    why_unreadable,
)
from evmamba_jax.errors import UserError

# Image and category ids are kept as 32-bit numbers; the ids of COCO's own crowds need 64.
_MOST_ID, _MOST_ANNOTATION_ID = 2**31, 2**63
_SLACK = 0.01  # pixels that a box may reach over the border uncounted: COCO rounds to hundredths

# What ends the preparation.
_BROKEN_ENTRY: Kind = "entry is broken", "entries are broken"
_BAD_ID: Kind = (
    "id is not a whole number from 0 to below 2**31 (annotations: 2**63)",
    "ids are not whole numbers from 0 to below 2**31 (annotations: 2**63)",
)
_SAME_ID: Kind = "id is there twice", "ids are there twice"
_SAME_FILE: Kind = "image file is named twice", "image files are named twice"
_WRONG_SIZE: Kind = "image has another size than the JSON says", "images have other sizes than the JSON says"
_NO_IMAGE: Kind = "annotation is for an image that is not listed", "annotations are for images that are not listed"
_NO_CATEGORY: Kind = "annotation has an unknown category_id", "annotations have an unknown category_id"
_BAD_BOX: Kind = "annotation has a broken bbox, area or iscrowd", "annotations have a broken bbox, area or iscrowd"
_BAD_MASK: Kind = "annotation has a broken segmentation", "annotations have a broken segmentation"

# What is counted and said.
_OUTSIDE: Kind = "object lies outside its image and is dropped", "objects lie outside their images and are dropped"
_TINY: Kind = (
    "object has no area, or a side below 1 pixel, and is dropped",
    "objects have no area, or a side below 1 pixel, and are dropped",
)
_OVER: Kind = "box reaches over the border and is kept", "boxes reach over the border and are kept"
_CROWD: Kind = "object is a crowd and is marked", "objects are crowds and are marked"
_NO_OBJECTS: Kind = (
    "image has no object to train on; it is kept to evaluate",
    "images have no object to train on; they are kept to evaluate",
)
_NO_AREA: Kind = "object has no area; its box's is taken", "objects have no area; their boxes' are taken"
_SHORT: Kind = (
    "polygon has under 3 points or half a point and is dropped; the box is kept",
    "polygons have under 3 points or half a point and are dropped; the boxes are kept",
)
_NO_MASK: Kind = "object has no outline", "objects have no outline"


class Categories(NamedTuple):
    """The classes in label order, which is the order of their ids.

    Attributes:
        ids: the category ids.
        names: in the same order.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]


@functools.cache
def coco_categories() -> Categories:
    """Return COCO's 80 categories, whose ids go to 90."""
    lines = (Path(__file__).parent / "coco_classes.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return Categories(tuple(int(number) for number, _ in pairs), tuple(name for _, name in pairs))


@dataclasses.dataclass(frozen=True, slots=True)
class BoxItem(Item):
    """An image with its objects.

    Attributes:
        image_id: of the JSON file.
        objects: UTF-8 JSON, see :func:`_columns`.
        count: number of objects, crowds included.
        usable: number of objects that are no crowds.
    """

    image_id: int
    objects: bytes
    count: int
    usable: int

    @property
    def size(self) -> int:
        """Bytes that the record takes, but for small things."""
        return self.image.size + len(self.objects)

    def identity(self) -> bytes:
        """Return what tells this item from every other."""
        return b"".join([Item.identity(self), str(self.image_id).encode(), b"\0", self.objects])

    def features(self) -> dict[str, bytes | int]:
        """Return the fields of the record; errors as for :meth:`Item.features`."""
        return {**Item.features(self), "image_id": self.image_id, "objects": self.objects}


def outside(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return which boxes have no part inside the image: bool (N,).

    Args:
        boxes: float (N, 4), x, y, width, height in pixels.
        height: of the image, pixels.
        width: the same.
    """
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inside = np.minimum(end, [width, height]) - np.maximum(start, 0)
    return np.asarray((inside <= 0).any(1))


def tiny(boxes: np.ndarray, slack: float = 0.0) -> np.ndarray:
    """Return which boxes have a side below 1 pixel: bool (N,).

    Args:
        boxes: float (N, 4), x, y, width, height in pixels.
        slack: what rounding may have taken from a side, pixels.
    """
    return np.asarray((boxes[:, 2:] < 1 - slack).any(1))


def read_boxes(images: Path, file: Path, problems: Cases, findings: Cases) -> tuple[Categories, list[BoxItem]]:
    """Read and check the images of one split.

    Args:
        images: the folder that the file names are relative to.
        file: the JSON file.
        problems: takes what ends the preparation; the items are of use only where nothing came to it.
        findings: takes what is counted and said.

    Returns:
        The categories, and the images in the order of their ids.

    Raises:
        UserError: the folder is missing; the file is no JSON in COCO's format.
    """
    if not images.is_dir():
        raise UserError(f"{images} is not a folder: name the folder of the images of {file}")
    content = _load(file)
    categories = _categories(content["categories"], file, problems)
    listed = _images(content["images"], file, problems)
    objects = _annotations(content["annotations"], images, file, listed, set(categories.ids), problems, findings)
    del content
    labels = {number: label for label, number in enumerate(categories.ids)}
    items = []
    ordered = sorted(listed.values(), key=lambda entry: entry["id"])
    looks = in_threads(functools.partial(_look, images), ordered, f"checking {images.name}")
    for entry, look in zip(ordered, looks, strict=True):
        name = f"{images.name}/{entry['file_name']}"
        own = objects.pop(entry["id"], [])
        usable = sum(not one["iscrowd"] for one in own)
        if not usable:
            findings.add(_NO_OBJECTS, name)
        if isinstance(look, Checked | str):
            kind, told = (_WRONG_SIZE, f"{name} ({entry['width']} x {entry['height']})")
            if isinstance(look, str):
                kind, told = (MISSING, name) if look == "" else (UNREADABLE, f"{name} ({look})")
            problems.add(kind, told)
            continue
        image, upright = look
        packed = json.dumps(_columns(own, labels), separators=(",", ":")).encode()
        items.append(
            BoxItem(
                id=entry["file_name"],
                image=image,
                height=entry["height"],
                width=entry["width"],
                upright=upright,
                image_id=entry["id"],
                objects=packed,
                count=len(own),
                usable=usable,
            )
        )
    return categories, items


def _columns(objects: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> dict[str, list]:
    """Return objects by columns: ids, labels, boxes (x, y, width, height in pixels), areas, crowd, segmentations."""
    return {
        "ids": [one["id"] for one in objects],
        "labels": [labels[one["category_id"]] for one in objects],
        "boxes": [one["bbox"] for one in objects],
        "areas": [one["area"] for one in objects],
        "crowd": [one["iscrowd"] for one in objects],
        "segmentations": [one["segmentation"] for one in objects],
    }


def _look(images: Path, entry: Mapping[str, Any]) -> tuple[Checked, bool] | Checked | str:
    """Check the file of an image.

    Returns:
        The file and whether it is read upright; the file alone where its size is another; "" where it is missing; in
        words why it cannot be read.
    """
    try:
        image, data = check_file(images / entry["file_name"])
        upright = check_image(data, entry["height"], entry["width"])
    except FileNotFoundError:
        return ""
    except (OSError, CorruptImageError) as error:
        return why_unreadable(error)
    return image if upright is None else (image, upright)


def _load(file: Path) -> dict[str, list]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{file} cannot be read as JSON ({reason}): name a JSON file in COCO's format") from error
    lists = "images", "annotations", "categories"
    lacking = [key for key in lists if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if lacking:
        raise UserError(
            f"{file} is not in COCO's format: it has no list {lacking[0]!r}, and {', '.join(lists)} are needed"
        )
    return content


def _is_id(value: Any, below: int = _MOST_ID) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < below


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _entries(
    entries: Iterable[Any], kind: str, file: Path, needed: Sequence[str], below: int, problems: Cases
) -> Iterable[dict]:
    """Give the entries of a list that have all keys and an id of their own."""
    seen = set()
    for number, entry in enumerate(entries):
        where = f"{kind}[{number}] of {file.name}"
        lacking = [key for key in needed if key not in entry] if isinstance(entry, dict) else ["every key"]
        if lacking:
            problems.add(_BROKEN_ENTRY, f"{where} lacks {', '.join(lacking)}")
        elif not _is_id(entry["id"], below):
            problems.add(_BAD_ID, f"{entry['id']!r} in {where}")
        elif entry["id"] in seen:
            problems.add(_SAME_ID, f"{entry['id']} in {where}")
        else:
            seen.add(entry["id"])
            yield entry


def _categories(entries: Iterable[Any], file: Path, problems: Cases) -> Categories:
    found, names = {}, set()
    for entry in _entries(entries, "categories", file, ("id", "name"), _MOST_ID, problems):
        name = entry["name"]
        if not isinstance(name, str) or not name.strip() or name in names:
            problems.add(_BROKEN_ENTRY, f"category {entry['id']} of {file.name} is called {name!r}, no name of its own")
        else:
            names.add(name)
        found[entry["id"]] = str(name)
    if not found:
        raise UserError(f"{file} lists no categories: at least one with 'id' and 'name' is needed")
    ids = tuple(sorted(found))
    return Categories(ids, tuple(found[number] for number in ids))


def _images(entries: Iterable[Any], file: Path, problems: Cases) -> dict[int, dict]:
    """Return the images by their ids."""
    found, files = {}, set()
    for entry in _entries(entries, "images", file, ("id", "file_name", "height", "width"), _MOST_ID, problems):
        name, sides = entry["file_name"], (entry["height"], entry["width"])
        if not isinstance(name, str) or not name or not all(_is_id(side) and side for side in sides):
            problems.add(
                _BROKEN_ENTRY,
                f"image {entry['id']} of {file.name} has file_name {name!r}, height {sides[0]!r}, width {sides[1]!r}",
            )
        elif name in files:
            problems.add(_SAME_FILE, f"{name} in {file.name}")
        else:
            files.add(name)
            found[entry["id"]] = entry
    if not entries:
        raise UserError(f"{file} lists no images")
    return found


def _annotations(
    entries: Iterable[Any],
    images: Path,
    file: Path,
    listed: Mapping[int, Mapping[str, Any]],
    categories: set[int],
    problems: Cases,
    findings: Cases,
) -> dict[int, list[dict]]:
    """Return the objects of each image, by its id; those that no pipeline uses are dropped and counted."""
    kept: dict[int, list[dict]] = {}
    needed = ("id", "image_id", "category_id", "bbox")
    for entry in _entries(entries, "annotations", file, needed, _MOST_ANNOTATION_ID, problems):
        told = f"annotation {entry['id']} of {file.name}"
        image, category = entry["image_id"], entry["category_id"]
        if not _is_id(image) or not _is_id(category):
            problems.add(_BAD_ID, f"image_id {image!r} or category_id {category!r} in {told}")
            continue
        if image not in listed:
            problems.add(_NO_IMAGE, f"{told} (image_id {image})")
            continue
        if category not in categories:
            some = ", ".join(map(str, sorted(categories)[:8])) + (", ..." if len(categories) > 8 else "")
            problems.add(_NO_CATEGORY, f"{told} (category_id {category}; allowed: {some})")
            continue
        height, width = listed[image]["height"], listed[image]["width"]
        told = f"annotation {entry['id']} of {images.name}/{listed[image]['file_name']}"
        box, area, crowd = entry["bbox"], entry.get("area"), entry.get("iscrowd", 0)
        whole = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if not whole or not (area is None or _is_number(area)) or crowd not in (0, 1):
            problems.add(_BAD_BOX, f"{told} (bbox {box!r}, area {area!r}, iscrowd {crowd!r})")
            continue
        if not _is_outline(entry.get("segmentation"), height, width):
            problems.add(_BAD_MASK, told)
            continue
        one = np.array([box], np.float64)
        if tiny(one)[0] or (area is not None and area <= 0):
            findings.add(_TINY, told)
            continue
        if outside(one, height, width)[0]:
            findings.add(_OUTSIDE, told)
            continue
        x, y, w, h = box
        if min(x, y) < -_SLACK or x + w > width + _SLACK or y + h > height + _SLACK:
            findings.add(_OVER, told)
        if area is None:
            findings.add(_NO_AREA, told)
        if crowd:
            findings.add(_CROWD, told)
        outline = entry.get("segmentation") or None
        if isinstance(outline, list):
            whole_polygons = [polygon for polygon in outline if len(polygon) >= 6 and len(polygon) % 2 == 0]
            for _ in range(len(outline) - len(whole_polygons)):
                findings.add(_SHORT, told)
            outline = whole_polygons or None
        if outline is None:
            findings.add(_NO_MASK, told)
        kept.setdefault(image, []).append(
            {
                "id": entry["id"],
                "category_id": category,
                "bbox": box,
                "area": w * h if area is None else area,
                "iscrowd": int(crowd),
                "segmentation": outline,
            }
        )
    return kept


def _is_outline(outline: Any, height: int, width: int) -> bool:
    """Return whether a segmentation is none, a list of polygons, or run lengths for an image of this size."""
    if not outline:
        return outline is None or isinstance(outline, list | dict)
    if isinstance(outline, list):
        return all(isinstance(polygon, list) and all(map(_is_number, polygon)) for polygon in outline)
    if not isinstance(outline, dict) or outline.get("size") != [height, width]:
        return False
    counts = outline.get("counts")
    if isinstance(counts, str):
        return bool(counts)
    return isinstance(counts, list) and all(map(_is_id, counts)) and sum(counts) == height * width
