"""Miniature ImageNet tars: the real layout and the real synsets, with crops of two real photographs."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from evmamba_jax.data.imagenet import synsets


def photograph(seed: int, height: int = 40, width: int = 48) -> bytes:
    """Cut a random piece from scikit-learn's china.jpg or flower.jpg.

    Args:
        seed: decides which piece.
        height: of the piece, pixels.
        width: of the piece, pixels.

    Returns:
        A JPEG file.
    """
    rng = np.random.default_rng(seed)
    photo = load_sample_image(("china.jpg", "flower.jpg")[seed % 2])
    top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
    return encode(Image.fromarray(photo[top : top + height, left : left + width]), "JPEG")


def encode(image: Image.Image, kind: str) -> bytes:
    """Return an image file of the named Pillow format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return buffer.getvalue()


def make_tar(path: Path | io.BytesIO, files: dict[str, bytes]) -> None:
    """Write a tar of the named files."""
    target = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode="w", format=tarfile.USTAR_FORMAT, **target) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def make_train_tar(path: Path, images_per_class: int = 2, classes: int = 1000) -> None:
    """Write an ILSVRC2012_img_train.tar: one tar a synset.

    Args:
        path: of the tar.
        images_per_class: real ImageNet has about 1300.
        classes: fewer than 1000 make a tar that must be refused.
    """
    # A hundred different photographs are enough; cutting 2000 would take most of the time.
    photographs = [photograph(seed) for seed in range(100)]
    inner_tars = {}
    for label, synset in enumerate(synsets()[:classes]):
        images = range(label * images_per_class, (label + 1) * images_per_class)
        buffer = io.BytesIO()
        make_tar(buffer, {f"{synset}_{i}.JPEG": photographs[i % 100] for i in images})
        inner_tars[f"{synset}.tar"] = buffer.getvalue()
    make_tar(path, inner_tars)


def make_validation_tar(path: Path, images: int = 50, missing: int | None = None) -> None:
    """Write an ILSVRC2012_img_val.tar.

    Args:
        path: of the tar.
        images: real ImageNet has 50000.
        missing: number, from 1, of an image to leave out.
    """
    numbers = [number for number in range(1, images + 1) if number != missing]
    make_tar(path, {f"ILSVRC2012_val_{number:08d}.JPEG": photograph(1000 + number) for number in numbers})
