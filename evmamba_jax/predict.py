"""Say what images show, in words, and draw it: their classes, or where what is.

    python -m evmamba_jax.predict --model evmamba_t --weights efficient_vmamba_tiny.ckpt china.jpg flower.jpg
    python -m evmamba_jax.predict --weights runs/digits --top 3 --out digits.png --csv digits.csv FOLDER
    python -m evmamba_jax.predict --weights runs/digits_segmentation --maps maps FOLDER
    python -m evmamba_jax.predict --weights runs/digits_detection --score 0.5 --json found.json FOLDER

Images are prepared as the model's card says, those for the model of a training run as that run evaluates.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax import answers, cli
from evmamba_jax.answers import Picture
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import looks_like_image
from evmamba_jax.data.device import normalize
from evmamba_jax.data.files import Folder
from evmamba_jax.data.imagenet import imagenet_classes
from evmamba_jax.dense import DensePredictor
from evmamba_jax.errors import UserError, printable
from evmamba_jax.models import model_card
from evmamba_jax.preprocessing import of_card, of_run, view
from evmamba_jax.weights.load import EMA_WORDS, Ema, is_composed, open_place

BATCH = 32  # images that the model sees at a time


class Predictor:
    """A model with its weights, and all else that a prediction depends on.

    Args:
        weights: a file of official weights; or a folder: a converted model, a training run (which stands for its newest
            checkpoint, or with early stopping its best), or one of its checkpoints.
        name: of the model; not needed for a folder that names it.
        ema: False takes the parameters of a run, True their moving average, "better" what the checkpoint's own
            evaluation found better.
        image_size: side of the images that the model sees, in pixels, where card or run say another.
        class_names: one a class, where run or ImageNet have others.

    Attributes:
        name: of the model.
        taken: the weights, in words.
        data: how images are prepared.
        class_names: one a class: as given, else as the run's data set has them, else ImageNet's where there are 1000,
            else numbers.

    Raises:
        UserError: weights or model that are missing or do not fit each other, a wrong size, too many names or too few.
    """

    kind = "classes"

    def __init__(
        self,
        weights: str | PathLike[str],
        name: str = "",
        *,
        ema: Ema = "better",
        image_size: int | None = None,
        class_names: Sequence[str] | None = None,
    ):
        model, self.name, _, found = open_place(weights, name, ema=ema)
        meta, self.taken = found.meta, found.taken
        if model.head is None:
            raise UserError(f"{weights} holds a model without a head, which tells no classes")
        classes = model.head.bias.get_value().size
        self.class_names = names_of_classes(class_names or meta.get("class_names"), classes)
        if len(self.class_names) != classes:
            told = len(self.class_names)
            raise UserError(f"there are {told} names of classes, but {weights} tells {classes} classes apart")
        self.data = images_of(meta, self.name)
        if image_size is not None:
            self.data.image_size = image_size
        self.data.validate()

        several = meta.get("config", {}).get("task") == "multilabel"  # each label by itself
        squash = jax.nn.sigmoid if several else jax.nn.softmax
        graphdef, *self._arrays = split(model)

        def forward(arrays: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            model = merge(graphdef, *arrays)
            head, model.head = model.head, None
            embeddings = model(normalize(images, self.data.mean, self.data.std))
            return squash(head(embeddings).astype(jnp.float32)), embeddings.astype(jnp.float32)

        self._forward = jax.jit(forward)

    def view(self, picture: Any) -> np.ndarray:
        """Return a picture as the model sees it, prepared as an evaluation does it.

        Args:
            picture: a path, the bytes of a file, a PIL image, or an array, as :func:`preprocess` takes it.

        Returns:
            uint8 (image_size, image_size, C).

        Raises:
            UserError: it cannot be read.
        """
        return view(picture, self.data)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes.

        Args:
            images: uint8 (B, H, W, C), as ``view`` gives them.

        Returns:
            float32 (B, K).
        """
        return self.answers(images)[0]

    def at_once(self) -> int:
        """Return how many images are answered for at a time."""
        return BATCH

    def remarks(self) -> list[str]:
        """Return what is to be said of the answers given so far."""
        return []

    def each(self, images: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return probabilities (K,) and embedding (D,) of each of several images."""
        return list(zip(*self.answers(np.stack(images)), strict=True))

    def answers(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the probabilities, float32 (B, K), and the embeddings, float32 (B, D), which enter the head."""
        size = min(BATCH, len(images))
        found = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filling = ((0, size - len(batch)), *((0, 0),) * 3)  # the last batch as long as the others: one program
            both = self._forward(self._arrays, np.pad(batch, filling))
            found.append([np.asarray(array)[: len(batch)] for array in both])
        probabilities, embeddings = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        return probabilities, embeddings


def names_of_classes(given: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Return the names that were given, else ImageNet's where there are 1000 classes, else numbers."""
    return tuple(map(str, given or (imagenet_classes() if classes == 1000 else range(classes))))


def images_of(meta: Mapping[str, Any], name: str) -> DataConfig:
    """Return how a model's images are prepared: as its run has it, else as the card of the model ``name`` asks."""
    return of_run(meta["config"]["data"]) if "config" in meta else of_card(model_card(name))


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.predict") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="Say what images show, in words, and draw it.")
    parser.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="the model, such as vmamba_t or upernet:vmamba_t; not needed for a folder that names it",
    )
    parser.add_argument(
        "--weights", required=True, metavar="FILE_OR_DIR", help="official weights, a converted model, or a training run"
    )
    parser.add_argument(
        "--ema",
        choices=EMA_WORDS,
        default="better",
        help="whether to take a run's moving average (default: where its evaluation found it better)",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="classes or boxes to name of each image, the first ones (5)"
    )
    parser.add_argument("--out", type=Path, default=Path("prediction.png"), metavar="PNG", help="(prediction.png)")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line in label order")
    parser.add_argument(
        "--csv", type=Path, metavar="CSV", help="also write the answers: a line an image, a class in it, or a box"
    )
    of_classes = parser.add_argument_group("where classes are named")
    of_classes.add_argument("--image-size", type=int, metavar="N", help="side in pixels, where it is to be another")
    of_classes.add_argument(
        "--embeddings", type=Path, metavar="NPZ", help="also write what enters the head: images (N,), embeddings (N, D)"
    )
    of_classes.add_argument("--sheet", type=Path, metavar="PNG", help="also draw all images small, by the class found")
    of_maps = parser.add_argument_group("where label maps are found")
    of_maps.add_argument(
        "--maps", type=Path, metavar="DIR", help="new folder for a PNG file an image: the class of each of its pixels"
    )
    of_boxes = parser.add_argument_group("where boxes are found")
    of_boxes.add_argument(
        "--score", type=float, metavar="S", help=f"the least score that a box must have ({answers.SCORE})"
    )
    of_boxes.add_argument("--json", type=Path, metavar="JSON", help="also write boxes and masks as COCO has them")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder, all images in it and below")
    return cli.main(lambda: _predict(parser.parse_args(argv)))


def _predict(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be 1 or more")
    for option, ending in (("out", ".png"), ("sheet", ".png"), ("embeddings", ".npz"), ("json", ".json")):
        file = getattr(args, option)
        if file is not None and file.suffix != ending:
            raise UserError(f"--{option} {file} must end in {ending}")
    pictures = list(pictures_in(args.images))
    predictor = _predictor(args)
    left_out: list[str] = []
    count = 0
    with answers.KINDS[predictor.kind](args, predictor.class_names) as noted:
        for picture, image, answer in _answered(predictor, pictures, left_out):
            if not count:
                print(f"weights: {predictor.taken}")
            count += 1
            print("\n".join([printable(str(picture.file)), *noted.note(picture, image, answer)]))
        if not count:
            raise UserError(f"no image can be read: {'; '.join(left_out[:3])}")
        lines = noted.finish(count)
    print("\n".join([*lines, *predictor.remarks()]))
    if left_out:
        print(f"left out: {len(left_out)} of {len(pictures)}", file=sys.stderr)
        for line in left_out:
            print(f"  {line}", file=sys.stderr)


def _predictor(args: argparse.Namespace) -> Predictor | DensePredictor:
    shared: Any = {"ema": EMA_WORDS[args.ema], "class_names": args.classes and _read_classes(args.classes)}
    if is_composed(args.weights, args.model):
        return DensePredictor(args.weights, args.model, **shared)
    return Predictor(args.weights, args.model, image_size=args.image_size, **shared)


def pictures_in(given: Sequence[str]) -> Iterator[Picture]:
    """Yield the files: as given, and of folders all images in them and below, sorted."""
    for name in given:
        path = Path(name)
        if not path.is_dir():
            yield Picture(path, Path(path.name))
            continue
        names = Folder(path).find().names
        images = [Picture(path / inside, Path(inside)) for inside in names if is_image(path / inside)]
        if not images:
            raise UserError(f"there are no images in the folder {path}")
        yield from images


def is_image(path: Path) -> bool:
    """Return whether a file begins as an image does; one that cannot be opened counts, so that it is told."""
    try:
        with open(path, "rb") as file:
            return looks_like_image(file.read(4096))
    except OSError:
        return True


def _answered(
    predictor: Predictor | DensePredictor, pictures: Iterable[Picture], left_out: list[str]
) -> Iterator[tuple[Picture, np.ndarray, Any]]:
    """Yield each picture, its view and the answer; note which cannot be read, and why."""
    read: list[tuple[Picture, np.ndarray]] = []

    def answers_so_far() -> Iterator[tuple[Picture, np.ndarray, Any]]:
        for (picture, image), answer in zip(read, predictor.each([image for _, image in read]), strict=True):
            yield picture, image, answer
        read.clear()

    for picture in pictures:
        try:
            read.append((picture, predictor.view(picture.file)))
        except UserError as error:
            left_out.append(str(error))
        if len(read) == predictor.at_once():
            yield from answers_so_far()
    if read:
        yield from answers_so_far()


def _read_classes(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


if __name__ == "__main__":
    sys.exit(main())
