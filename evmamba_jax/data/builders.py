"""TFDS builders of the data sets that need no network."""

import contextlib
import gzip
import io
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from evmamba_jax.data.stamps import Stamps
from evmamba_jax.errors import UserError


@contextlib.contextmanager
def writing(name: str, data_dir: Path) -> Iterator[None]:
    """Silence what TFDS announces while it writes, and tell a disk that fails or is full in one line."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError, on a full disk for instance
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{name} cannot be written to {data_dir}: {reason}") from error


def check_space(name: str, data_dir: Path, size: int) -> None:
    """Check that the disk has room for a data set.

    Args:
        name: of the data set.
        data_dir: where it is written; it need not exist.
        size: of its images and labels, bytes.

    Raises:
        UserError: there is too little.
    """
    existing = data_dir
    while not existing.exists():
        existing = existing.parent
    needed, free = int(1.02 * size), shutil.disk_usage(existing).free  # names, labels and the record files' own
    if free < needed:
        raise UserError(
            f"{name} needs {needed / 1e9:.3g} GB in {data_dir} and {free / 1e9:.3g} GB are free;"
            " free some space or choose another folder with --data-dir"
        )


def _png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) as PNG; TFDS would call TensorFlow for that."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class _ArraysBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set that lies in memory as uint8 images (B, H, W) and labels (B,)."""

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield i, {"image": _png(image), "label": int(label)}


class Digits(_ArraysBuilder, skip_registration=True):
    """scikit-learn's 1797 scanned digits, 8x8 pixels, in a fixed stratified split."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits, 8x8 grey pixels, as scikit-learn carries them; 1437 train, 360 test.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        images = np.round(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)  # the scans hold 0 to 16
        train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=labels, random_state=0)
        return {
            split: self._generate_examples(images[index], labels[index])
            for split, index in (("train", train), ("test", test))
        }


class FashionMnistDebian(_ArraysBuilder, skip_registration=True):
    """Fashion-MNIST as Debian packages it; recompressed there, so TFDS's own builder refuses its checksums."""

    name = "fashion_mnist_debian"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        names = [
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ]
        return tfds.core.DatasetInfo(
            builder=self,
            description="Zalando's clothes, 28x28 grey pixels; 60000 train, 10000 test.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=names),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
        )

    def _split_generators(self, dl_manager):
        folder = Path(os.environ.get("FASHION_MNIST_DIR") or "/usr/share/datasets/fashion-mnist")
        files = {split: _idx_files(folder, stem) for split, stem in (("train", "train"), ("test", "t10k"))}
        return {split: self._generate_examples(*map(_read_idx, pair)) for split, pair in files.items()}


def _idx_files(folder: Path, stem: str) -> tuple[Path, Path]:
    images, labels = folder / f"{stem}-images-idx3-ubyte.gz", folder / f"{stem}-labels-idx1-ubyte.gz"
    for file in (images, labels):
        if not file.is_file():
            raise UserError(
                f"fashion_mnist_debian: {file} is missing;"
                " apt-get install dataset-fashion-mnist, or set FASHION_MNIST_DIR to the folder of the idx.gz files"
            )
    return images, labels


def _read_idx(file: Path) -> np.ndarray:
    """Read LeCun's idx format: two zero bytes, type (8 = uint8), rank, the sizes (big endian), the values."""
    try:
        data = gzip.decompress(file.read_bytes())
        rank = data[3]
        shape = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, struct.error) as error:
        raise UserError(
            f"fashion_mnist_debian: {file} is not a whole idx.gz file ({error}); install it again"
        ) from error


OWN = {"digits": Digits, "fashion_mnist_debian": FashionMnistDebian, "stamps": Stamps}
