"""ImageNet-1k from its two tars to TFDS's ``imagenet2012/5.1.0``, without TensorFlow and without trust.

TFDS's own builder needs TensorFlow and verifies nothing: one image missing from the validation tar would silently shift
every label after it. Here everything is checked before the first byte is written. Both tars are only indexed, never
unpacked: every image has one byte offset, so the records can be written in TFDS's shuffled order straight away, without
temporary files. The tars are therefore read in random order and should lie on a solid-state disk.
"""

import dataclasses
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.hashing import Hasher
from tensorflow_datasets.core.utils.shard_utils import ShardConfig, get_shard_boundaries
from tqdm import tqdm

from evmamba_jax.data.builders import check_space, writing
from evmamba_jax.errors import UserError

TRAIN_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000


@dataclasses.dataclass(frozen=True, slots=True)
class TarImage:
    """One image inside a tar: where its bytes lie and what it shows."""

    name: str
    label: str  # WordNet id, such as n01440764
    tar: Path
    offset: int  # bytes from the start of the tar
    size: int  # bytes


class Imagenet2012(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes the records, in the order and with the fields of TFDS's builder of the same name and version."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")

    def __init__(self, *, images: Mapping[str, Sequence[TarImage]], data_dir: Path, written: Callable[[], object]):
        """Take the images of each split, the folder of the TFDS folders, and what to call after every record."""
        self._images = images
        self._written = written
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="ILSVRC 2012: photographs of 1000 WordNet synsets.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=synsets()),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://image-net.org/",
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator]]]:
        return {split: self._shards(split, images) for split, images in self._images.items()}

    def _shards(self, split: str, images: Sequence[TarImage]) -> list[Callable[[], Iterator]]:
        """Sort the images as TFDS does, by a hash of the file name, and cut them into as many shards."""
        hasher = Hasher(split)
        ordered = sorted(images, key=lambda image: hasher.hash_key(image.name))
        count = ShardConfig().get_number_shards(sum(image.size for image in images), len(images))
        stops = get_shard_boundaries(len(images), count)
        return [partial(self._examples, ordered[start:stop]) for start, stop in zip([0, *stops], stops, strict=False)]

    def _examples(self, images: Sequence[TarImage]) -> Iterator[tuple[str, dict]]:
        for image in images:
            yield image.name, {"image": _read(image), "label": image.label, "file_name": image.name}
            self._written()


def _read(image: TarImage) -> bytes:
    """Return an RGB or grey JPEG; ImageNet's 22 CMYK images and its one PNG are encoded anew, as TFDS does."""
    with open(image.tar, "rb", buffering=0) as file:
        file.seek(image.offset)
        data = file.read(image.size)
    try:
        if simplejpeg.is_jpeg(data) and simplejpeg.decode_jpeg_header(data)[2] not in ("CMYK", "YCCK"):
            return data
        with Image.open(io.BytesIO(data)) as picture:
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=100)
            return buffer.getvalue()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{image.tar}: {image.name} is not a readable image ({error}); download the tar again"
        ) from error


def synsets() -> list[str]:
    """Return the 1000 WordNet ids in label order, which is sorted order."""
    return tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def in_words(names: Iterable[str]) -> tuple[str, ...]:
    """Replace the WordNet ids of ImageNet's classes by the words of their synsets; other names stay as they are."""
    words = dict(zip(synsets(), imagenet_classes(), strict=True))
    return tuple(words.get(name, name) for name in names)


def imagenet_classes() -> list[str]:
    """Return the 1000 classes in words, such as "tench, Tinca tinca", in label order.

    Source: WordNet 3.0; NOTICE has its licence. "crane" is two classes, the bird and the machine.
    """
    return (Path(__file__).parent / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def validation_labels() -> list[str]:
    """Return the WordNet id of every validation image, in the order of the file names."""
    return tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()


def prepare_imagenet(
    train_tar: Path,
    validation_tar: Path,
    data_dir: Path,
    *,
    train_images: int = TRAIN_IMAGES,
    validation_images: int = VALIDATION_IMAGES,
) -> Path:
    """Write ``data_dir/imagenet2012/5.1.0``, after checking that nothing is missing.

    The folder appears under its name only when it is complete; an interruption leaves nothing behind.

    Args:
        train_tar: ILSVRC2012_img_train.tar.
        validation_tar: ILSVRC2012_img_val.tar.
        data_dir: holds the TFDS folders.
        train_images: how many images the train tar must hold.
        validation_images: how many the validation tar must hold, numbered from 1.

    Returns:
        The folder.

    Raises:
        UserError: a tar is absent, damaged, incomplete or another one; too little disk space; an unwritable folder.
    """
    for tar in (train_tar, validation_tar):
        if not tar.is_file():
            raise UserError(
                f"{tar} does not exist: download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org"
            )
    validation = index_validation_tar(validation_tar, validation_images)
    train = index_train_tar(train_tar, train_images)
    check_space("imagenet2012", data_dir, sum(image.size for image in [*train, *validation]))
    with (
        writing("imagenet2012", data_dir),
        tqdm(total=len(train) + len(validation), desc="writing", unit=" images", mininterval=1.0) as progress,
    ):
        images = {"train": train, "validation": validation}
        builder = Imagenet2012(images=images, data_dir=data_dir, written=progress.update)
        builder.download_and_prepare()
    return Path(builder.data_dir)


def index_validation_tar(tar: Path, expected: int) -> list[TarImage]:
    """List the validation images with their labels.

    Args:
        tar: ILSVRC2012_img_val.tar.
        expected: how many images it must hold.

    Returns:
        The images in the order of their names.

    Raises:
        UserError: the tar is damaged, or its names are not ILSVRC2012_val_00000001.JPEG and so on to ``expected``.
    """
    members = {os.path.basename(member.name): member for member in _members(tar)}
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, expected + 1)]
    missing = [name for name in names if name not in members]
    foreign = sorted(members.keys() - set(names))
    if missing or foreign:
        problems = [f"lacks {len(missing)} images, the first is {missing[0]}"] if missing else []
        problems += [f"holds {len(foreign)} unexpected files, the first is {foreign[0]}"] if foreign else []
        raise UserError(f"{tar} is not the whole validation tar of {expected} images: it {' and '.join(problems)}")
    labels = validation_labels()
    return [
        TarImage(name, labels[i], tar, members[name].offset_data, members[name].size) for i, name in enumerate(names)
    ]


def index_train_tar(tar: Path, expected: int) -> list[TarImage]:
    """List the training images with their labels.

    Args:
        tar: ILSVRC2012_img_train.tar, a tar of one tar a synset.
        expected: how many images all of them must hold.

    Returns:
        The images in the order of the tar.

    Raises:
        UserError: a tar is damaged, a synset is missing or unknown, or the number of images is another.
    """
    inner_tars = {os.path.basename(member.name): member for member in _members(tar)}
    names = [f"{synset}.tar" for synset in synsets()]
    missing = [name for name in names if name not in inner_tars]
    foreign = sorted(inner_tars.keys() - set(names))
    if missing or foreign:
        problems = [f"lacks {len(missing)} of the 1000 synsets, the first is {missing[0]}"] if missing else []
        problems += [f"holds {len(foreign)} unexpected files, the first is {foreign[0]}"] if foreign else []
        raise UserError(f"{tar} is not the whole train tar: it {' and '.join(problems)}")
    images = []
    with tqdm(total=expected, desc="checking train", unit=" images", mininterval=1.0, leave=False) as progress:
        for name, inner in inner_tars.items():
            for member in _members(tar, inner):
                label = name.removesuffix(".tar")
                images.append(TarImage(os.path.basename(member.name), label, tar, member.offset_data, member.size))
                progress.update()
    if len(images) != expected:
        raise UserError(f"{tar} holds {len(images)} images where {expected} are expected; download it again")
    return images


def _members(tar: Path, inner: tarfile.TarInfo | None = None) -> list[tarfile.TarInfo]:
    """List the files of a tar, or of the tar inside it at ``inner``; offsets count from the start of the outer one."""
    label = str(tar) if inner is None else f"{inner.name} in {tar}"
    try:
        with open(tar, "rb") as file:
            end = tar.stat().st_size if inner is None else inner.offset_data + inner.size
            file.seek(0 if inner is None else inner.offset_data)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                members = [member for member in archive if member.isfile()]
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{label} is damaged or not a tar ({error}); download it again") from error
    if any(member.offset_data + member.size > end for member in members):
        raise UserError(f"{label} is truncated; download it again")
    return members
