"""Data sets with boxes or label maps, from the files that people have: all is checked before the first byte is written.

Each function returns the folder that it wrote; see :mod:`evmamba_jax.data.dense_shards` for what is in it, and
:func:`evmamba_jax.data.dense.open_dense`, which reads it.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from evmamba_jax.data.cases import Cases
from evmamba_jax.data.coco_json import Categories, read_boxes
from evmamba_jax.data.dense_items import Item
from evmamba_jax.data.dense_shards import SHARD_BYTES, DenseSet, refuse_foreign, write_set
from evmamba_jax.data.label_maps import IGNORED, read_ade20k_classes, read_classes, read_label_maps
from evmamba_jax.errors import UserError

Places = Mapping[str, tuple[Path, Path]]  # by split: the folder of the images, and the JSON file or folder of labels


def prepare_coco(source: Path, data_dir: Path) -> Path:
    """Write ``data_dir/coco`` from the official folders of COCO 2017.

    Args:
        source: holds annotations/instances_{train,val}2017.json, train2017/ and val2017/.
        data_dir: holds the data sets.

    Raises:
        UserError: as :func:`prepare_boxes`.
    """
    places = {
        split: (source / year, source / "annotations" / f"instances_{year}.json")
        for split, year in (("train", "train2017"), ("validation", "val2017"))
    }
    return prepare_boxes("coco", places, data_dir)


def prepare_ade20k(source: Path, data_dir: Path) -> Path:
    """Write ``data_dir/ade20k`` from the folder ADEChallengeData2016: 150 classes, label 0 is ignored.

    Args:
        source: holds images/ and annotations/ with training/ and validation/ each, and objectInfo150.txt.
        data_dir: holds the data sets.

    Raises:
        UserError: as :func:`prepare_label_maps`.
    """
    places = {
        split: (source / "images" / folder, source / "annotations" / folder)
        for split, folder in (("train", "training"), ("validation", "validation"))
    }
    classes = read_ade20k_classes(source / "objectInfo150.txt")
    return _prepare_label_maps("ade20k", places, classes, True, data_dir)


def prepare_boxes(name: str, places: Places, data_dir: Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write ``data_dir/name`` from JSON files in COCO's format.

    Args:
        name: of the data set.
        places: the folder of the images and the JSON file of each split.
        data_dir: holds the data sets.
        shard_bytes: size of one file, about.

    Raises:
        UserError: something is missing, broken or refused; all of it is told in one line. The disk is full or cannot
            be written.
    """
    found: dict[str, Categories] = {}

    def read(split: str, problems: Cases, findings: Cases) -> list[Item]:
        found[split], items = read_boxes(*places[split], problems, findings)
        first, own = next(iter(found.values())), found[split]
        if own != first:
            strange = sorted(set(zip(*own, strict=True)) ^ set(zip(*first, strict=True)))[0]
            raise UserError(
                f"{places[split][1]} has other categories than {places[next(iter(found))][1].name}: {strange[1]!r} with"
                f" id {strange[0]} is in one of them only; all splits need the same"
            )
        return [*items]

    return _prepare(name, "boxes", places, read, lambda: next(iter(found.values())), data_dir, shard_bytes)


def prepare_label_maps(
    name: str,
    places: Places,
    classes: Path,
    data_dir: Path,
    *,
    ignore_zero: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``data_dir/name`` from folders of images and folders of PNG files with the same stems.

    Args:
        name: of the data set.
        places: the folder of the images and the folder of the label maps of each split.
        classes: a file that names the classes, one a line in label order.
        data_dir: holds the data sets.
        ignore_zero: whether label 0 is ignored and line 1 of the file is label 1; otherwise line 1 is label 0.
        shard_bytes: size of one file, about.

    Raises:
        UserError: as :func:`prepare_boxes`.
    """
    names = read_classes(classes)
    if ignore_zero and len(names) >= IGNORED:
        raise UserError(f"{classes} names {len(names)} classes; with label 0 ignored {IGNORED - 1} are allowed")
    return _prepare_label_maps(name, places, names, ignore_zero, data_dir, shard_bytes)


def _prepare_label_maps(
    name: str,
    places: Places,
    classes: tuple[str, ...],
    ignore_zero: bool,
    data_dir: Path,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    def read(split: str, problems: Cases, findings: Cases) -> list[Item]:
        return [*read_label_maps(*places[split], classes, ignore_zero, problems, findings)]

    categories = Categories(tuple(range(len(classes))), classes)
    return _prepare(name, "label_maps", places, read, lambda: categories, data_dir, shard_bytes)


def _prepare(
    name: str,
    kind: str,
    places: Places,
    read: Callable[[str, Cases, Cases], list[Item]],
    categories: Callable[[], Categories],
    data_dir: Path,
    shard_bytes: int,
) -> Path:
    """Check all splits, print what was counted, and write."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"--name {name!r} is not allowed: a name of letters, digits, '_', '-' and '.' is needed")
    refuse_foreign(data_dir / name)
    problems = Cases()
    splits, findings = {}, {}
    for split in places:
        counted = Cases()
        splits[split] = read(split, problems, counted)
        turned = [item.id for item in splits[split] if not item.upright]
        for one in turned:
            counted.add(
                ("image is read as it is stored, against its EXIF data", "images are read as stored, against EXIF"), one
            )
        findings[split] = [f"{split}: {line}" for line in counted.told()]
    problems.refuse(name)
    classes = categories()
    for split, items in splits.items():
        about = f"{split}: {len(items):,} images of {len(classes.names):,} classes"
        if kind == "boxes":
            about += f", {sum(item.count for item in items):,} objects"
        findings[split].insert(0, about)
        print(*findings[split], sep="\n", flush=True)
    return write_set(DenseSet(name, kind, classes, splits, findings), data_dir, shard_bytes)
