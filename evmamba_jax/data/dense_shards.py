"""A data set with boxes or label maps on the disk: ``OUT/NAME`` with array_record files, sizes and ``info.json``.

- ``train-00000-of-00012.array_record``: a ``tf.train.Example`` with image (the file's own bytes), id, upright, and
  image_id and objects (JSON by columns), or label_map (8-bit PNG, 255 ignored).
- ``train-sizes.npy``: int32 (N, 2), height and width of each image, pixels.
- ``train-objects.npy``: int32 (N, 2), boxes only: objects of each image, and those that are no crowds.
- ``info.json`` is written last: without it the set is unfinished.
- ``plan.json`` is there while the set is written: the hash of all inputs, which decides what is kept.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from evmamba_jax.data.builders import check_space, writing
from evmamba_jax.data.coco_json import BoxItem, Categories
from evmamba_jax.data.dense_items import Item, in_threads
from evmamba_jax.errors import UserError
from evmamba_jax.storage import OWNER, owned, written_whole

INFO, PLAN = "info.json", "plan.json"
VERSION = "1.0.0"  # of this form
SHARD_BYTES = 256 * 2**20
_TEMPLATE = "{SPLIT}-{SHARD_X_OF_Y}.{FILEFORMAT}"
_OURS = re.compile(
    r"(\w+-\d{5}-of-\d{5}\.array_record|\w+-(sizes|objects)\.npy|info\.json|plan\.json)(\.tmp)?|" + re.escape(OWNER)
)


class DenseSet(NamedTuple):
    """A whole data set, checked and ready to be written.

    Attributes:
        name: of its folder.
        kind: "boxes" or "label_maps".
        categories: the classes in label order with their own ids.
        splits: the images of each split, in order.
        findings: what was counted in each split, a line each.
    """

    name: str
    kind: str
    categories: Categories
    splits: Mapping[str, Sequence[Item]]
    findings: Mapping[str, Sequence[str]]


def split_info(folder: Path, split: str, lengths: Sequence[int], size: int) -> tfds.core.SplitInfo:
    """Return TFDS's description of a split, which knows the names of its files and reads slices.

    Args:
        folder: of the data set.
        split: its name.
        lengths: number of records of each file.
        size: of all of them, bytes.
    """
    template = ShardedFileTemplate(epath.Path(folder), _TEMPLATE, split=split, filetype_suffix="array_record")
    return tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=size, filename_template=template)


def write_set(dense: DenseSet, data_dir: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a data set, or what is missing of it.

    Files that an earlier call finished are kept where all inputs are the same; otherwise all is written anew. A call
    that is ended leaves no half file under its final name.

    Args:
        dense: the data set.
        data_dir: holds its folder.
        shard_bytes: size of one file, about.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds other files, another process writes it, the disk is full or cannot be written, or
            an image has changed since it was checked.
    """
    folder = data_dir / dense.name
    refuse_foreign(folder)
    prints = {split: _fingerprint(dense, items) for split, items in dense.splits.items()}
    plan = json.dumps({"version": VERSION, "shard_bytes": shard_bytes, "splits": prints, "findings": dense.findings})
    cuts = {split: _cuts([item.size for item in items], shard_bytes) for split, items in dense.splits.items()}
    with writing(dense.name, data_dir), owned(folder):
        if not (folder / PLAN).is_file() or (folder / PLAN).read_text() != plan:
            for file in folder.iterdir():
                if _OURS.fullmatch(file.name) and file.name != OWNER:
                    file.unlink()
        shards = [
            (Path(path), items[start:stop])
            for split, items in dense.splits.items()
            for path, (start, stop) in zip(_files(folder, split, cuts[split]), cuts[split], strict=True)
        ]
        kept = [path for path, items in shards if path.is_file() and _count(path) == len(items)]
        left = [(path, items) for path, items in shards if path not in kept]
        if kept:
            print(f"going on: {len(kept)} of {len(shards)} files of {dense.name} are there", file=sys.stderr)
        check_space(dense.name, data_dir, sum(item.size for _, items in left for item in items))
        with written_whole(folder / PLAN) as file:
            file.write_text(plan)
        with tqdm(total=sum(len(items) for _, items in left), desc="writing", unit=" images", mininterval=1.0) as bar:
            for path, items in left:
                with written_whole(path) as file:
                    _write(file, items)
                bar.update(len(items))
        for split, items in dense.splits.items():
            _save(folder / f"{split}-sizes.npy", [(item.height, item.width) for item in items])
            boxes = [(item.count, item.usable) for item in items if isinstance(item, BoxItem)]
            if boxes:
                _save(folder / f"{split}-objects.npy", boxes)
        with written_whole(folder / INFO) as file:
            file.write_text(json.dumps(_info(dense, folder, prints, cuts), indent=1), encoding="utf-8")
        (folder / PLAN).unlink()
    return folder


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds files of something else.

    Raises:
        UserError: naming the first.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, where a folder is to be made: choose another name or --data-dir")
    files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    foreign = [name for name in files if not _OURS.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{folder} holds {len(foreign)} files of something else, the first is {foreign[0]}: choose another name or"
            " --data-dir"
        )


def progress_of(folder: Path) -> str:
    """Return in words how much of an unfinished data set is written."""
    return f"{len(list(folder.glob('*.array_record')))} files are written"


def _fingerprint(dense: DenseSet, items: Sequence[Item]) -> str:
    """Return a hash of contents, order and classes of a split."""
    found = hashlib.sha256(json.dumps([VERSION, dense.kind, dense.categories]).encode())
    for item in items:
        found.update(hashlib.sha256(item.identity()).digest())
    return found.hexdigest()[:32]


def _cuts(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return where files start and stop, (first, last + 1), so that each has about ``most`` bytes."""
    before = np.cumsum([0, *sizes[:-1]])
    starts = np.flatnonzero(np.diff(before // most, prepend=-1)).tolist()
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))


def _files(folder: Path, split: str, cuts: Sequence[tuple[int, int]]) -> list[Path]:
    return [Path(path) for path in split_info(folder, split, [stop - start for start, stop in cuts], 0).filepaths]


def _count(path: Path) -> int:
    """Return the number of records of a file; -1 where it is damaged."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        try:
            return reader.num_records()
        finally:
            reader.close()
    except Exception:  # the extension raises RuntimeError, ValueError or its own status
        return -1


def _write(path: Path, items: Sequence[Item]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")  # as TFDS writes, one record a read
    try:
        for record in in_threads(_record, items, path.name.removesuffix(".tmp")):
            writer.write(record)
    finally:
        writer.close()


def _record(item: Item) -> bytes:
    example = tf_example_pb2.Example()  # pyrefly: ignore[missing-attribute]
    for key, value in item.features().items():
        feature = example.features.feature[key]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return example.SerializeToString(deterministic=True)


def _save(path: Path, rows: Sequence[tuple[int, int]]) -> None:
    with written_whole(path) as part, open(part, "wb") as file:
        np.save(file, np.array(rows, np.int32))


def _info(
    dense: DenseSet, folder: Path, prints: Mapping[str, str], cuts: Mapping[str, Sequence[tuple[int, int]]]
) -> dict:
    splits = {}
    for split, items in dense.splits.items():
        files = _files(folder, split, cuts[split])
        splits[split] = {
            "shards": {path.name: stop - start for path, (start, stop) in zip(files, cuts[split], strict=True)},
            "bytes": sum(item.size for item in items),
            "fingerprint": prints[split],
            "findings": list(dense.findings[split]),
        }
    classes = [{"id": k, "name": name} for k, name in zip(*dense.categories, strict=True)]
    return {"name": dense.name, "version": VERSION, "kind": dense.kind, "classes": classes, "splits": splits}
