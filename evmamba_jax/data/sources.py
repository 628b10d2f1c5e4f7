"""Random access to the encoded records of a prepared TFDS folder, without TensorFlow."""

import contextlib
import dataclasses
import io
import re
import socket
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from evmamba_jax.data import builders
from evmamba_jax.data.config import DataConfig, resolve_data_dir
from evmamba_jax.data.imagenet import in_words
from evmamba_jax.data.pictures import PLACES, PictureSource, open_split
from evmamba_jax.data.tfrecord import TFRecordFiles, record_offsets
from evmamba_jax.errors import UserError, nearest

IMAGENET_COMMAND = (
    "python -m evmamba_jax.data prepare imagenet2012 --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar"
)


class Records(Protocol):
    """Serialised examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> bytes: ...


class Record(TypedDict):
    """One undecoded example."""

    image: bytes  # the encoded file
    label: int
    id: str  # its file name where the data set has one, else split[index]


class Split(Protocol):
    """One split of any data set, as the loader sees it: ``split[i]`` gives an undecoded record with an ``"id"``."""

    @property
    def name(self) -> str:
        """Of the data set, with its version."""
        ...

    @property
    def split(self) -> str:
        """The split's name, slices included."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of an image-classification data set; ``source[i]`` gives an undecoded record.

    Attributes:
        name: of the data set, with its version.
        split: as asked for, slices included.
        class_names: in label order; words where the data set has WordNet ids.
        records: the serialised ``tf.train.Example`` protos.
        fingerprint: tells other data of the same name from these; None where nothing is known.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    records: Records
    fingerprint: str | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Return one record.

        Args:
            index: 0 to len - 1.

        Returns:
            The record, its image still encoded.

        Raises:
            UserError: the file that holds the record is damaged.
        """
        with reading(self.name, f"{self.split}[{index}]"):
            feature = features_of(self.records[index])
            image, label = feature["image"].bytes_list.value[0], feature["label"].int64_list.value[0]
        file_name = feature["file_name"].bytes_list.value if "file_name" in feature else ()
        return {"image": image, "label": label, "id": file_name[0].decode() if file_name else f"{self.split}[{index}]"}


def features_of(record: bytes) -> Any:
    """Return the features of a serialised ``tf.train.Example``, by name."""
    return tf_example_pb2.Example.FromString(record).features.feature  # pyrefly: ignore[missing-attribute]


@contextlib.contextmanager
def reading(name: str, record: str) -> Iterator[None]:
    """Tell in one line that a record of a data set cannot be read, whatever is raised.

    Raises:
        UserError: naming the data set and the record.
    """
    try:
        yield
    except Exception as error:  # array_record and protobuf raise bare RuntimeErrors and their own kinds
        raise UserError(f"record {record} of {name} cannot be read ({_first_line(error)}): prepare it again") from error


def open_source(
    config: DataConfig, split: str, work: Path | None = None, *, several: bool = False
) -> Source | PictureSource:
    """Open one split of the configured data set, preparing it first where that needs no files from the user.

    ``folder``, ``table`` and ``hf`` are pictures of the user's own: :mod:`evmamba_jax.data.pictures`. ``digits``,
    ``fashion_mnist_debian`` and ``stamps`` are prepared on first use; other TFDS names are downloaded by TFDS where no
    prepared folder exists; ``imagenet2012`` must have been prepared. Folders made by others are read as they are, in
    array_record or tfrecord.

    Args:
        config: reads name (also ``name/config`` and ``name:version``) and data_dir.
        split: a split's name, or a TFDS slice such as ``"train[:90%]"``.
        work: a folder for the index of the user's own pictures, where it cannot be kept beside them.
        several: whether an image may have several labels, or none, as only the user's own pictures can.

    Returns:
        The source.

    Raises:
        UserError: the folder is missing, foreign or incomplete, the split is unknown or empty, the download failed, or
            the data set holds no images with labels.
    """
    if config.name in PLACES:
        return open_split(config, split, work, several=several)
    if several:
        raise UserError(
            f"data.name={config.name!r} has one label an image; several are read from a table of your own pictures "
            "(data.name=table), or set config.task=classification"
        )
    data_dir = resolve_data_dir(config.data_dir)
    folder = find_folder(data_dir, config.name)
    if folder is None:
        prepare(config.name, data_dir)
        folder = find_folder(data_dir, config.name)
    assert folder is not None
    return _open_folder(folder, split)


def labels_of(source: Any) -> np.ndarray:
    """Return the class of every example of a split, int (N,): known where pictures were listed, else read one by one.

    Raises:
        UserError: its images have several labels; a record is damaged.
    """
    if getattr(source, "label_sets", None) is not None:
        raise UserError(f"the images of {source.name} may have several labels, so classes cannot be balanced")
    known = getattr(source, "labels", None)
    return np.array([source[i]["label"] for i in range(len(source))]) if known is None else known


# Classes and training images of the data sets that need not be here: their own documentation.
KNOWN = {
    "imagenet2012": (1000, 1_281_167),
    "digits": (10, 1437),
    "fashion_mnist_debian": (10, 60_000),
    "stamps": (10, 5122),
}


class Description(NamedTuple):
    """What is known of a data set without opening a split.

    Attributes:
        class_names: in label order; numbers where they are not known.
        examples: length of the training split.
        known_from: a folder, or words.
    """

    class_names: tuple[str, ...]
    examples: int
    known_from: str


def describe(config: DataConfig) -> Description:
    """Describe the configured data set; of the user's own pictures the files are listed, else nothing is opened.

    Raises:
        UserError: a data set that is neither here nor known.
    """
    if config.name in PLACES:
        source = open_split(config, config.train_split)
        return Description(source.class_names, len(source), source.name)
    data_dir = resolve_data_dir(config.data_dir)
    folder = find_folder(data_dir, config.name)
    if folder is not None:
        info = tfds.builder_from_directory(folder).info
        if config.train_split in info.splits or base_of(config.train_split) in info.splits:
            classes = _class_names(config.name, info.features)
            return Description(classes, info.splits[config.train_split].num_examples, str(folder))
    stem = re.split("[/:]", config.name)[0]
    if stem not in KNOWN:
        raise UserError(
            f"data.name={config.name!r} is not prepared in {data_dir}, so its classes are not known: prepare it, or "
            f"check with one of {', '.join(KNOWN)}, whose classes are"
        )
    classes, examples = KNOWN[stem]
    return Description(tuple(map(str, range(classes))), examples, "known without the data")


def find_folder(data_dir: Path, name: str) -> Path | None:
    """Find a prepared data set.

    Args:
        data_dir: holds the TFDS folders.
        name: ``name``, ``name/config``, either with ``:version``; without a version the newest is taken.

    Returns:
        The folder ``data_dir/name[/config]/version``, or None where nothing of that name lies there.

    Raises:
        UserError: something lies there that TFDS has not written completely.
    """
    stem, _, version = name.partition(":")
    parent = data_dir / stem
    if not parent.is_dir():
        return None
    children = [child.name for child in parent.iterdir() if child.is_dir()]
    versions = sorted(
        (c for c in children if re.fullmatch(r"\d+\.\d+\.\d+", c)), key=lambda v: [*map(int, v.split("."))]
    )
    if version and version not in versions:
        return None
    if not versions:
        configs = sorted(child for child in children if any((parent / child).glob("*/dataset_info.json")))
        if configs:
            raise UserError(f"{name} needs a config: set data.name to one of {[f'{stem}/{c}' for c in configs]}")
        if _holds_files(parent):
            raise UserError(
                f"{parent} is not a TFDS folder: a version folder such as 1.0.0 with dataset_info.json is expected;"
                f" for pictures in a folder a class, set data.name=folder and data.data_dir={parent}"
            )
        return None
    folder = parent / (version or versions[-1])
    for file in ("dataset_info.json", "features.json"):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} is not a prepared TFDS folder: it has no {file};"
                " set data.data_dir to another folder, or delete this one and prepare it again"
            )
    return folder


def _holds_files(folder: Path) -> bool:
    """Whether there is more than what an interrupted preparation leaves: empty, hidden and incomplete folders."""
    for child in folder.iterdir():
        if not child.name.startswith((".", "incomplete.")) and (child.is_file() or _holds_files(child)):
            return True
    return False


def prepare(name: str, data_dir: Path) -> None:
    """Prepare a data set that needs no files from the user, as array_record.

    Args:
        name: digits, fashion_mnist_debian, stamps or a TFDS name.
        data_dir: holds the TFDS folders.

    Raises:
        UserError: an unknown name, or whatever kept TFDS from preparing it, in one line.
    """
    if name.partition(":")[0] == "imagenet2012":
        where = data_dir / "imagenet2012"
        raise UserError(
            f"imagenet2012 is not prepared: looked for {where}/5.1.0;"
            f" set data.data_dir, or prepare it from the two tars with: {IMAGENET_COMMAND} --data-dir {data_dir}"
        )
    if name in builders.OWN:
        _prepare_own(name, data_dir)
        return
    known = [*builders.OWN, "imagenet2012", *tfds.list_builders(with_community_datasets=False)]
    if re.split("[/:]", name)[0] not in known:
        raise UserError(f"unknown data set data.name={name!r}{nearest(name, known)}; not prepared in {data_dir} either")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a banner where TensorFlow is missing
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            _check_network(builder)
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        raise
    except ImportError as error:
        missing = re.search(r"No module named '([^'.]+)", str(error))  # TFDS re-raises without the error's own name
        package = missing[1] if missing else "another package"
        raise UserError(
            f"TFDS needs {package} to prepare {name}: pip install {package}, or copy a prepared folder to {data_dir}"
        ) from error
    except Exception as error:  # TFDS lets through whatever network, disk and each data set's own code raise
        raise UserError(f"TFDS could not prepare {name}: {type(error).__name__}: {_first_line(error)}") from error


def _check_network(builder: tfds.core.DatasetBuilder) -> None:
    """Fail at once where the download's host is unknown; TFDS would try for minutes."""
    if urllib.request.getproxies():
        return  # the proxy, not this machine, looks up names
    for host in {urllib.parse.urlsplit(url).hostname for url in builder.url_infos or {}}:
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise UserError(
                f"{builder.name} is not prepared in {builder.data_dir}, and it cannot be downloaded: {host} cannot be"
                " reached; copy a prepared folder there, or go online"
            ) from error


def _prepare_own(name: str, data_dir: Path) -> None:
    print(f"preparing {name} in {data_dir}", file=sys.stderr)
    tfds.display_progress_bar(False)  # a few seconds' work; TFDS would show five nested bars
    try:
        with builders.writing(name, data_dir):
            builder = builders.OWN[name](data_dir=data_dir, file_format="array_record")
            builder.download_and_prepare(file_format="array_record")
    except UserError:
        if find_folder(data_dir, name) is None:  # otherwise another process was faster
            raise
    finally:
        tfds.display_progress_bar(True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _open_folder(folder: Path, split: str) -> Source:
    """Open a split of a prepared folder after checking that all of it is there."""
    builder = tfds.builder_from_directory(folder)
    name, info = f"{builder.info.name}:{builder.info.version}", builder.info
    class_names = _class_names(name, info.features)
    records, _ = open_records(name, folder, info.splits, split, info.file_format.file_suffix)
    whole = info.splits[base_of(split)]  # the same in whatever format the records are kept
    fingerprint = f"{name} {split} {list(whole.shard_lengths)} {whole.num_bytes}"
    return Source(name=name, split=split, class_names=class_names, records=records, fingerprint=fingerprint)


def base_of(split: str) -> str:
    """Return the split that a TFDS slice such as ``"train[:90%]"`` is cut from."""
    return re.split(r"[\[+]", split)[0]


def open_records(
    name: str,
    folder: Path,
    splits: tfds.core.splits.SplitDict,
    split: str,
    suffix: str,
    promise: str = "dataset_info.json",
) -> tuple[Records, list[tuple[str, np.ndarray]]]:
    """Open the records of a split after checking that all of it is there.

    Args:
        name: of the data set, for messages.
        folder: holds the files.
        splits: all that there are.
        split: as asked for, slices included.
        suffix: of the files: "array_record" or "tfrecord".
        promise: the file that says how many records there are.

    Returns:
        The records; and where they come from, in parts: a split's name and the numbers of the records in it, int64.

    Raises:
        UserError: no such split, or an empty one; files that are missing, incomplete or of another kind.
    """
    base = base_of(split)
    if base not in splits:
        raise UserError(f"{name} has no split {split!r}{nearest(base, splits)}; there are {sorted(splits)}")
    if not splits[base].num_examples:
        raise UserError(f"split {base!r} of {name} in {folder} is empty")
    try:
        instructions = splits[split].file_instructions
    except (ValueError, KeyError) as error:
        raise UserError(f"split {split!r} of {name} cannot be read: {_first_line(error)}") from error
    if not instructions:
        raise UserError(f"split {split!r} of {name} in {folder} is empty")

    shards = [Path(path) for path in splits[base].filepaths]
    present = {path.name for path in folder.iterdir()}
    missing = [shard.name for shard in shards if shard.name not in present]
    if missing:
        raise UserError(
            f"{folder} is incomplete: {len(missing)} of the {len(shards)} files of split {base!r} are missing,"
            f" the first is {missing[0]}; copy them or prepare {name.partition(':')[0]} again"
        )
    expected = splits[base].shard_lengths
    if suffix == "array_record":
        # Not at the top: there is none for Windows, where pictures in folders are read all the same.
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        _check_counts(shards, _count_array_records(shards), expected, promise)
        _allow_open_files(len(shards))
        records: Records = ArrayRecordDataSource(instructions)
    elif suffix == "tfrecord":
        offsets = record_offsets(shards)
        _check_counts(shards, [len(starts) for starts in offsets], expected, promise)
        starts = dict(zip(map(str, shards), offsets, strict=True))
        records = TFRecordFiles(
            [(str(i.filename), starts[str(i.filename)][i.skip : i.skip + i.take]) for i in instructions]
        )
    else:
        raise UserError(f"{folder} is stored as {suffix}, which is not read here; prepare it as array_record")
    starts_at = {}
    for other, info in splits.items():  # a sum such as "train+test" reads from several
        before = np.cumsum([0, *info.shard_lengths]).tolist()
        starts_at |= {str(path): (other, first) for path, first in zip(info.filepaths, before, strict=False)}
    parts = []
    for instruction in instructions:
        other, first = starts_at[str(instruction.filename)]
        parts.append((other, first + instruction.skip + np.arange(instruction.take, dtype=np.int64)))
    return records, parts


def _class_names(name: str, features) -> tuple[str, ...]:
    """Return the label names, or refuse what is not image classification."""
    fields = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = fields.get("image"), fields.get("label")
    has_images = isinstance(image, tfds.features.Image) and image.np_dtype == np.uint8
    if not (has_images and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"{name} is not an image-classification data set: an 8-bit 'image' and a class 'label' are needed,"
            f" it has { {key: type(field).__name__ for key, field in fields.items()} }"
        )
    return in_words(label.names) if label.names else tuple(map(str, range(label.num_classes or 0)))


def _check_counts(shards: Sequence[Path], counts: Sequence[int], expected: Sequence[int], promise: str) -> None:
    for shard, count, wanted in zip(shards, counts, expected, strict=True):
        if count != wanted:
            raise UserError(f"{shard} is incomplete: {count} records where {promise} promises {wanted}; copy it again")


def _count_array_records(shards: Sequence[Path]) -> list[int]:
    from array_record.python.array_record_module import ArrayRecordReader

    def count(shard: Path) -> int:
        try:
            reader = ArrayRecordReader(str(shard))
            try:
                return reader.num_records()
            finally:
                reader.close()
        except Exception as error:  # the extension raises RuntimeError, ValueError or its own status
            raise UserError(f"{shard} is damaged ({_first_line(error)}); copy it again") from error

    with ThreadPoolExecutor(16) as pool:  # a network disk answers many at once
        return list(pool.map(count, shards))


def _allow_open_files(shards: int) -> None:
    """Raise the soft limit of open files: every array_record shard stays open, and ImageNet has more than 1024."""
    if sys.platform == "win32":
        return  # it has no such limit
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = soft + 2 * shards
    if soft != resource.RLIM_INFINITY and shards > 256:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
        )
