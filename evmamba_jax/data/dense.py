"""Random access to data sets with boxes or label maps: prepared here, or COCO as TFDS prepares it."""

import abc
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from evmamba_jax.data.coco_json import coco_categories, outside, tiny
from evmamba_jax.data.config import resolve_data_dir
from evmamba_jax.data.decoding import image_size
from evmamba_jax.data.dense_items import in_threads
from evmamba_jax.data.dense_shards import INFO, PLAN, VERSION, progress_of, split_info
from evmamba_jax.data.kept import kept_arrays
from evmamba_jax.data.sources import Description, Records, base_of, features_of, find_folder, open_records, reading
from evmamba_jax.errors import UserError, nearest

# What is known of a data set that is not here: classes and training images, of COCO those that show objects.
KNOWN = {"coco": (coco_categories().names, 117_266), "ade20k": (tuple(map(str, range(150))), 20_210)}
PREPARE = {
    "stamp_scenes": "prepare stamp_scenes",
    "coco": "prepare coco --source DIR",
    "ade20k": "prepare ade20k --source ADEChallengeData2016",
}
_PREPARE_OWN = "prepare boxes --name {0} ...` or `prepare label_maps --name {0} ..."
_SMALLEST = 32  # pixels of an image's side: mmdet trains on none that is smaller
_ROUNDED = 1e-3  # pixels that 32-bit fractions of a side may lose


@dataclasses.dataclass(frozen=True)
class DenseSplit(abc.ABC):
    """One split; ``split[i]`` gives an undecoded record.

    Every record has ``image`` (the file's bytes), ``id`` (its name) and ``upright``: the pixels that boxes and labels
    belong to are ``decode(record["image"], 3, upright=record["upright"])``, and their size is ``sizes[i]``.

    Attributes:
        name: of the data set, with its version.
        split: as asked for, slices included.
        class_names: in label order.
        category_ids: the data set's own id of each label.
        fingerprint: tells other data of the same name from these.
        findings: what was counted when the data were prepared, a line each.
        records: the serialised ``tf.train.Example`` protos.
        sizes: int32 (N, 2), height and width of each image, pixels.
    """

    kind: ClassVar[str]

    name: str
    split: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    fingerprint: str
    findings: tuple[str, ...]
    records: Records
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one record, see the kinds.

        Args:
            index: 0 to len - 1.

        Raises:
            UserError: the file that holds the record is damaged.
        """
        with reading(self.name, f"{self.split}[{index}]"):
            return self._record(features_of(self.records[index]), index)

    @abc.abstractmethod
    def _record(self, features: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return a record, from the fields of its proto."""


class LabelMapSplit(DenseSplit):
    """A split with a ``label_map`` in every record: an 8-bit grey PNG file of labels, 255 where a pixel is ignored."""

    kind = "label_maps"

    def _record(self, features: Mapping[str, Any], index: int) -> dict[str, Any]:
        return {**_image(features), "label_map": _bytes(features, "label_map")}


@dataclasses.dataclass(frozen=True)
class BoxSplit(DenseSplit):
    """A split with objects in every record.

    ``image_id``; ``boxes`` float64 (G, 4), x0, y0, x1, y1 in pixels; ``labels`` int32 (G,); ``crowd`` bool (G,);
    ``area`` float64 (G,) in pixels; ``segmentations``, for each object a list of polygons, a dictionary of run lengths
    or None; ``annotation_ids`` int64 (G,).

    Attributes:
        objects: int32 (N, 2), the number of objects of each image, and of those that are no crowds.
    """

    kind = "boxes"

    objects: np.ndarray

    @property
    def most_objects(self) -> int:
        """The largest number of objects of an image, crowds included."""
        return int(self.objects[:, 0].max())

    @property
    def has_objects(self) -> np.ndarray:
        """Whether an image has an object that is no crowd, bool (N,)."""
        return self.objects[:, 1] > 0

    @property
    def has_outlines(self) -> bool:
        """Whether any object that is no crowd has an outline; records are read until one has."""
        records = (self[int(index)] for index in np.flatnonzero(self.has_objects))
        return any(
            outline is not None and not crowd
            for record in records
            for outline, crowd in zip(record["segmentations"], record["crowd"], strict=True)
        )

    def with_objects(self) -> "BoxSplit":
        """Return the images to train on: those with an object that is no crowd, and sides of 32 pixels or more."""
        chosen = np.flatnonzero(self.has_objects & (self.sizes.min(1) >= _SMALLEST))
        if not len(chosen):
            raise UserError(f"no image of {self.name}, split {self.split}, has an object to train on")
        records = _Chosen(self.records, chosen)
        return dataclasses.replace(self, records=records, sizes=self.sizes[chosen], objects=self.objects[chosen])

    def _record(self, features: Mapping[str, Any], index: int) -> dict[str, Any]:
        found = json.loads(_bytes(features, "objects"))
        corners = np.array(found["boxes"], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        return {
            **_image(features),
            "image_id": int(features["image_id"].int64_list.value[0]),
            "boxes": corners,
            "labels": np.array(found["labels"], np.int32),
            "crowd": np.array(found["crowd"], bool),
            "area": np.array(found["areas"], np.float64),
            "segmentations": found["segmentations"],
            "annotation_ids": np.array(found["ids"], np.int64),
        }


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Some of the records."""

    records: Records
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes:
        return self.records[int(self.indices[index])]


class TfdsCocoSplit(BoxSplit):
    """A split of TFDS's ``coco``: no segmentations; boxes and areas as TFDS rounds them."""

    has_outlines = False

    def _record(self, features: Mapping[str, Any], index: int) -> dict[str, Any]:
        height, width = self.sizes[index].tolist()
        return {
            "image": _bytes(features, "image"),
            "id": _bytes(features, "image/filename").decode(),
            "upright": True,
            **_tfds_objects(features, height, width),
        }


def open_dense(name: str, data_dir: str | Path, split: str) -> BoxSplit | LabelMapSplit:
    """Open one split of a data set with boxes or label maps.

    Args:
        name: a folder that ``python -m evmamba_jax.data prepare`` wrote, or ``coco/2017``, TFDS's own.
        data_dir: holds the data sets; "" for TFDS's own default.
        split: a split's name, or a TFDS slice such as ``"train[:90%]"``.

    Returns:
        The split.

    Raises:
        UserError: the data set is missing, unfinished, incomplete or of another kind, or the split is unknown or
            empty.
    """
    root = resolve_data_dir(str(data_dir))
    if _is_ours(root / name):
        return _open_ours(root / name, split)
    folder = _tfds_folder(name, root)
    if folder is None:
        raise UserError(f"data.name={name!r} is not prepared in {root}: {_hint(name)}, or set data.data_dir")
    return _open_tfds(name, folder, split)


def describe_dense(name: str, data_dir: str | Path, split: str = "train") -> Description:
    """Describe a data set without opening it.

    Args:
        name: as :func:`open_dense` takes it; ``coco`` and ``ade20k`` need not be here, nor the names of ADE20K's
            classes be known then: they are numbers.
        data_dir: as :func:`open_dense` takes it.
        split: whose length is given; where nothing is here, the training split's is.

    Raises:
        UserError: a data set that is neither here nor known; an unknown split.
    """
    root = resolve_data_dir(str(data_dir))
    if _is_ours(root / name):
        info = _info(root / name)
        splits = _splits(root / name, info)
        return Description(_class_names(info), _examples(name, splits, split), str(root / name))
    folder = _tfds_folder(name, root)
    if folder is not None:
        splits = tfds.builder_from_directory(folder).info.splits
        return Description(coco_categories().names, _examples(name, splits, split), str(folder))
    stem = name.partition("/")[0].partition(":")[0]
    if stem not in KNOWN:
        raise UserError(
            f"data.name={name!r} is not prepared in {root}, so its classes are not known: {_hint(name)}, or check with"
            f" one of {', '.join(KNOWN)}, whose classes are"
        )
    return Description(*KNOWN[stem], "known without the data")


def _hint(name: str) -> str:
    known = PREPARE.get(name.partition("/")[0]) or _PREPARE_OWN.format(name)
    return f"run `python -m evmamba_jax.data {known}`"


def _is_ours(folder: Path) -> bool:
    """Return whether a data set was prepared here, as a whole or in part."""
    return any((folder / file).is_file() for file in (INFO, PLAN))


def _tfds_folder(name: str, root: Path) -> Path | None:
    if "/" not in name and any(root.glob(f"{name}/*/*/dataset_info.json")):
        configs = sorted({f"{name}/{path.parts[-3]}" for path in root.glob(f"{name}/*/*/dataset_info.json")})
        raise UserError(
            f"data.name={name!r} is not prepared here, but TFDS's own is: set data.name to one of {configs}, or "
            f"{_hint(name)}"
        )
    return find_folder(root, name)


def _info(folder: Path) -> dict[str, Any]:
    if not (folder / INFO).is_file():
        raise UserError(f"{folder} is unfinished ({progress_of(folder)}): run `prepare` again, it goes on from there")
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        known = info["version"], info["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INFO} is damaged ({error}): delete {folder} and prepare it again") from error
    if known not in ((VERSION, "boxes"), (VERSION, "label_maps")):
        raise UserError(
            f"{folder} is of version and kind {known}, which are not read here: delete it and prepare it again"
        )
    return info


def _class_names(info: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(one["name"] for one in info["classes"])


def _splits(folder: Path, info: Mapping[str, Any]) -> tfds.core.splits.SplitDict:
    return tfds.core.splits.SplitDict(
        [
            split_info(folder, split, list(about["shards"].values()), about["bytes"])
            for split, about in info["splits"].items()
        ]
    )


def _examples(name: str, splits: Mapping[str, Any], split: str) -> int:
    base = base_of(split)
    if base not in splits:
        raise UserError(f"{name} has no split {split!r}{nearest(base, splits)}; there are {sorted(splits)}")
    return splits[split].num_examples


def _open_ours(folder: Path, split: str) -> BoxSplit | LabelMapSplit:
    info = _info(folder)
    name = f"{info['name']}:{info['version']}"
    records, parts = open_records(name, folder, _splits(folder, info), split, "array_record", INFO)
    bases = list(dict.fromkeys(base for base, _ in parts))
    about = [info["splits"][base] for base in bases]
    known = {
        "name": name,
        "split": split,
        "class_names": _class_names(info),
        "category_ids": tuple(one["id"] for one in info["classes"]),
        "fingerprint": " ".join([name, split, *(one["fingerprint"] for one in about)]),
        "findings": tuple(line for one in about for line in one["findings"]),
        "records": records,
        "sizes": _rows(folder, "sizes", parts, info),
    }
    if info["kind"] == "label_maps":
        return LabelMapSplit(**known)
    return BoxSplit(**known, objects=_rows(folder, "objects", parts, info))


def _rows(folder: Path, what: str, parts: Sequence[tuple[str, np.ndarray]], info: Mapping[str, Any]) -> np.ndarray:
    """Return the rows of a kept array that belong to the records."""
    arrays = {}
    for base, _ in parts:
        file = folder / f"{base}-{what}.npy"
        try:
            arrays[base] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file} cannot be read ({reason}): delete {folder} and prepare it again") from error
        if arrays[base].shape != (sum(info["splits"][base]["shards"].values()), 2):
            raise UserError(f"{file} does not fit {INFO}: delete {folder} and prepare it again")
    return np.concatenate([arrays[base][rows] for base, rows in parts])


def _open_tfds(name: str, folder: Path, split: str) -> TfdsCocoSplit:
    """Open TFDS's COCO; sizes of images are read from their files at the first call, and kept."""
    info = tfds.builder_from_directory(folder).info
    told = f"{name.partition(':')[0]}:{info.version}"
    fields = set(info.features.keys()) if isinstance(info.features, tfds.features.FeaturesDict) else set()
    objects = getattr(info.features["objects"], "feature", None) if "objects" in fields else None
    label = objects["label"] if isinstance(objects, tfds.features.FeaturesDict) and "bbox" in objects else None
    categories = coco_categories()
    if tuple(getattr(label, "names", None) or ()) != categories.names:
        raise UserError(
            f"{folder} holds no boxes of COCO's 80 classes, the only ones that are read as TFDS has them: prepare the "
            "data set from its own files with `python -m evmamba_jax.data prepare boxes`"
        )
    suffix = info.file_format.file_suffix
    records, parts = open_records(told, folder, info.splits, split, suffix)
    about = {base: _scanned(told, folder, info.splits, base, suffix) for base, _ in parts}
    findings = []
    for base, found in about.items():
        dropped = int(found[:, 4].sum())
        findings.append(f"{base}: {len(found):,} images of 80 classes, {int(found[:, 2].sum()):,} objects, no outlines")
        if dropped:
            findings.append(f"{base}: {dropped:,} objects lie outside or have a side below 1 pixel and are dropped")
        bare = int((found[:, 3] == 0).sum())
        if bare:
            findings.append(f"{base}: {bare:,} images have no object to train on; they are kept to evaluate")
    found = np.concatenate([about[base][rows] for base, rows in parts])
    lengths = [list(info.splits[base].shard_lengths) for base in about]
    return TfdsCocoSplit(
        name=told,
        split=split,
        class_names=categories.names,
        category_ids=categories.ids,
        fingerprint=f"{told} {split} {lengths}",
        findings=tuple(findings),
        records=records,
        sizes=found[:, :2],
        objects=found[:, 2:4],
    )


def _scanned(name: str, folder: Path, splits: Any, split: str, suffix: str) -> np.ndarray:
    """Return height, width, objects, those that are no crowds, and dropped ones of each image: int32 (N, 5)."""

    def scan() -> dict[str, np.ndarray]:
        records, _ = open_records(name, folder, splits, split, suffix)

        def look(index: int) -> tuple[int, ...]:
            with reading(name, f"{split}[{index}]"):
                features = features_of(records[index])
                height, width = image_size(_bytes(features, "image"), upright=True)
                found = _tfds_objects(features, height, width)
            crowd, listed = found["crowd"], len(features["objects/label"].int64_list.value)
            return height, width, len(crowd), int((~crowd).sum()), listed - len(crowd)

        rows = list(in_threads(look, range(len(records)), f"sizes of {split}"))
        return {"rows": np.array(rows, np.int32).reshape(-1, 5)}

    return kept_arrays("coco", [Path(path) for path in splits[split].filepaths], scan)["rows"]


def _tfds_objects(features: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    """Return the objects of a record of TFDS as :class:`BoxSplit` has them."""
    fractions = np.array(features["objects/bbox"].float_list.value, np.float64).reshape(-1, 4)  # y0, x0, y1, x1
    corners = fractions[:, [1, 0, 3, 2]] * [width, height, width, height]
    sides = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    kept = ~(tiny(sides, _ROUNDED) | outside(sides, height, width))

    def column(key: str) -> np.ndarray:
        return np.array(features[f"objects/{key}"].int64_list.value, np.int64)[kept]

    return {
        "image_id": int(features["image/id"].int64_list.value[0]),
        "boxes": corners[kept],
        "labels": column("label").astype(np.int32),
        "crowd": column("is_crowd").astype(bool),
        "area": column("area").astype(np.float64),
        "segmentations": [None] * int(kept.sum()),
        "annotation_ids": column("id"),
    }


def _image(features: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "image": _bytes(features, "image"),
        "id": _bytes(features, "id").decode(),
        "upright": bool(features["upright"].int64_list.value[0]),
    }


def _bytes(features: Mapping[str, Any], key: str) -> bytes:
    return features[key].bytes_list.value[0]
