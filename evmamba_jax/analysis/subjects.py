"""What the commands look into: models and photographs, as a command line names them."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.answers import Picture
from evmamba_jax.data.config import DataConfig
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.models.registry import VARIANTS, build_model, input_size
from evmamba_jax.predict import images_of, names_of_classes, pictures_in
from evmamba_jax.preprocessing import view
from evmamba_jax.storage import is_bucket
from evmamba_jax.weights.load import Ema, open_place
from evmamba_jax.weights.places import HUB

MODEL_HELP = (
    "a registered model with its initial values, e.g. vmamba_t; NAME=PLACE with the weights of a file, a folder, a hub "
    "name or 'official', e.g. vmamba_t=vssm1_tiny.pth; or a training run, a checkpoint, a converted model"
)
IMAGES_HELP = "a picture, or a folder of them (default: the two photographs that scikit-learn brings)"


class Subject(NamedTuple):
    """A model to look into.

    Attributes:
        label: what a picture calls it: as it was given.
        name: of the model, as registered.
        model: in evaluation mode.
        data: how its images are prepared.
        class_names: one a class; empty for a model without a head.
        taken: its weights, in words.
        several: whether an image may have several classes, each of which has a probability by itself.
    """

    label: str
    name: str
    model: Any
    data: DataConfig
    class_names: tuple[str, ...]
    taken: str
    several: bool = False


def open_subject(given: str, *, ema: Ema = "better", image_size: int | None = None) -> Subject:
    """Open a model as a command line names it.

    Args:
        given: ``NAME``, with its initial values; ``NAME=PLACE``; or a place that says which model it holds.
        ema: as for :func:`evmamba_jax.weights.load.open_place`.
        image_size: side of its images in pixels, where it is to be another than its card's or run's.

    Raises:
        UserError: an unknown name or place; weights that do not fit; a size that cannot be.
    """
    name, _, place = given.partition("=")
    if given in VARIANTS:
        model, meta, taken = build_model(given), {}, "initial values, seed 0"
    else:
        if name not in VARIANTS:
            name, place = "", given
            if not (given.startswith(HUB) or is_bucket(given) or Path(given).exists()):
                near = nearest(given, VARIANTS)
                raise UserError(f"{given!r} is neither a model nor a place of weights{near}; allowed: {MODEL_HELP}")
        model, name, _, found = open_place(place, name, ema=ema)
        meta, taken = found.meta, found.taken
    # Nothing is published of a model for experiments, so that nothing asks for its images in another way.
    data = images_of(meta, name) if meta or VARIANTS[name].card else DataConfig(image_size=input_size(name)[0])
    if image_size is not None:
        data.image_size = image_size
    data.validate()
    classes = 0 if model.head is None else model.head.bias.get_value().size
    class_names = names_of_classes(meta.get("class_names"), classes) if classes else ()
    several = meta.get("config", {}).get("task") == "multilabel"
    return Subject(given, name, model, data, class_names, taken, several)


def photographs(given: Sequence[str]) -> list[Picture]:
    """Return the pictures that a command line names; of none, the two that scikit-learn brings."""
    if not given:
        import sklearn.datasets  # late: it takes a second

        given = [str(Path(sklearn.datasets.__file__).parent / "images" / name) for name in ("china.jpg", "flower.jpg")]
    return list(pictures_in(given))


def views(pictures: Sequence[Picture], data: DataConfig) -> tuple[list[Picture], np.ndarray]:
    """Return the pictures that can be read, and what a model sees of them; tell on stderr which cannot.

    Returns:
        The pictures, and uint8 (N, image_size, image_size, C).

    Raises:
        UserError: none can be read.
    """
    read, seen, left_out = [], [], []
    for picture in pictures:
        try:
            seen.append(view(picture.file, data))
            read.append(picture)
        except UserError as error:
            left_out.append(str(error))
    if not read:
        raise UserError(f"no image can be read: {'; '.join(left_out[:3])}")
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    return read, np.stack(seen)


def png(text: str) -> Path:
    """Return the path of a picture to write, as the ``type`` of an option; refuses another ending than .png."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} must end in .png")
    return Path(text)
