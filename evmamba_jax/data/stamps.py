"""Stamps: a small set of colour pictures that needs no network, pasted on photographs."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from evmamba_jax.errors import UserError

CLASSES = {  # and the package's folder of each
    "bird": "animals/birds",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "house": "town/houses",
    "insect": "animals/insects",
    "mammal": "animals/mammals",
    "money": "symbols/money",
    "road sign": "town/roadsigns",
    "vegetable": "food/vegetables",
    "vehicle": "vehicles",
}
SIDE = 96  # of the pictures, pixels
_PACKAGE = "/usr/share/tuxpaint/stamps"
_SHARES = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of the stamps of a class
_VIEWS = {"train": 26, "validation": 4, "test": 4}  # pictures a stamp
# The part of a photograph's width that a split's backgrounds are cut from, so that none is seen in two splits.
_WIDTHS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}


class Stamps(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Tux Paint's stamps on pieces of scikit-learn's two photographs: 10 classes, split by stamp."""

    name = "stamps"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Stamps of Tux Paint (Debian's tuxpaint-stamps-default, GPL-2), turned, scaled and pasted on pieces of "
                f"scikit-learn's two photographs; {SIDE}x{SIDE} pixels. No stamp is in two splits."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=list(CLASSES)),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://tuxpaint.org/stamps/",
        )

    def _split_generators(self, dl_manager):
        grounds = photographs()
        return {split: self._generate_examples(split, stamps_of(split), grounds) for split in _SHARES}

    def _generate_examples(
        self, split: str, stamps: Iterator["Stamp"], grounds: Sequence[Image.Image]
    ) -> Iterator[tuple[str, dict]]:
        for stamp in stamps:
            for view in range(_VIEWS[split]):
                key = f"{stamp.file}/{view}"
                rng = np.random.default_rng(list(_digest(key)))
                image = _jpeg(_paste(stamp.image, grounds, split, rng))
                yield key, {"image": image, "label": stamp.name, "file_name": key}


class Stamp(NamedTuple):
    """A stamp: the name of its class, its file within the package, and its picture, RGBA."""

    name: str
    file: str
    image: Image.Image


def stamps_of(split: str) -> Iterator[Stamp]:
    """Return the stamps of a split, class by class; they are opened as they are asked for.

    Raises:
        UserError: there are none, or one cannot be read.
    """
    package = Path(os.environ.get("TUXPAINT_STAMPS_DIR") or _PACKAGE)
    files = {name: _stamps(package, folder) for name, folder in CLASSES.items()}
    low, high = _SHARES[split]
    return (
        Stamp(name, file, _open(package / file))
        for name, of_class in files.items()
        for file in of_class[round(low * len(of_class)) : round(high * len(of_class))]
    )


def photographs() -> list[Image.Image]:
    """Return scikit-learn's two photographs, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def _stamps(package: Path, folder: str) -> list[str]:
    """Return a class's files, relative to the package, in an order of chance that is always the same."""
    found = [path.relative_to(package).as_posix() for path in (package / folder).rglob("*.png")]
    found = [file for file in found if "_mirror" not in file]  # the mirror image of another stamp
    if not found:
        raise UserError(
            f"stamps: there are no pictures in {package / folder}; apt-get install tuxpaint-stamps-default, or set "
            "TUXPAINT_STAMPS_DIR to the folder that holds animals, food, plants and the others"
        )
    return sorted(found, key=_digest)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _open(file: Path) -> Image.Image:
    """Return a stamp as RGBA, cut to what can be seen of it."""
    try:
        with Image.open(file) as image:
            stamp = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"stamps: {file} cannot be read ({error}); install tuxpaint-stamps-default again") from error
    return stamp.crop(stamp.getchannel("A").getbbox())


def _paste(stamp: Image.Image, grounds: Sequence[Image.Image], split: str, rng: np.random.Generator) -> Image.Image:
    """Return a stamp, turned and scaled, somewhere on a piece of a photograph."""
    picture = piece_of_photograph(grounds, split, SIDE, rng)
    shown = turned(stamp, (0.5 * SIDE, 0.95 * SIDE), rng)
    x, y = (int(rng.integers(SIDE - length + 1)) for length in shown.size)
    picture.paste(shown, (x, y), shown)
    return picture


def piece_of_photograph(grounds: Sequence[Image.Image], split: str, side: int, rng: np.random.Generator) -> Image.Image:
    """Return a square of ``side`` pixels cut out of a photograph, enlarged only where its split's part is smaller."""
    photograph = grounds[int(rng.integers(len(grounds)))]
    left, right = (round(edge * photograph.width) for edge in _WIDTHS[split])
    most = min(right - left, photograph.height)
    cut = int(rng.integers(min(side, most), most + 1))
    x, y = (int(rng.integers(low, high - cut + 1)) for low, high in ((left, right), (0, photograph.height)))
    return photograph.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + cut, y + cut))


def turned(stamp: Image.Image, longest: tuple[float, float], rng: np.random.Generator) -> Image.Image:
    """Return a stamp turned by up to 20 degrees, its longer side between two lengths, pixels."""
    shown = stamp.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    shown = shown.crop(shown.getchannel("A").getbbox())
    scale = rng.uniform(*longest) / max(shown.size)
    return shown.resize([max(1, round(scale * length)) for length in shown.size], Image.Resampling.LANCZOS)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()
