"""Say what images show, in words, and draw it.

    python -m evmamba_jax.predict --model evmamba_t --weights efficient_vmamba_tiny.ckpt china.jpg flower.jpg
    python -m evmamba_jax.predict --weights runs/digits --top 3 --out digits.png seven.png

Images are prepared as the model's card says, those for the model of a training run as that run evaluates.
"""

import argparse
import sys
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from evmamba_jax import cli
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.device import normalize
from evmamba_jax.data.imagenet import imagenet_classes
from evmamba_jax.data.transforms import eval_crop
from evmamba_jax.errors import UserError
from evmamba_jax.models import model_card
from evmamba_jax.reports.predictions import guesses
from evmamba_jax.storage import storage_errors
from evmamba_jax.weights.load import EMA_WORDS, Ema, open_place

BATCH = 32  # images that the model sees at a time
DRAWN = 24  # images in the picture


class Predictor:
    """A model with its weights, and all else that a prediction depends on.

    Args:
        weights: a file of official weights; or a folder: a converted model, a training run (which stands for its newest
            checkpoint), or one of its checkpoints.
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
        names = class_names or meta.get("class_names") or (imagenet_classes() if classes == 1000 else range(classes))
        if len(names) != classes:
            raise UserError(f"there are {len(names)} names of classes, but {weights} tells {classes} classes apart")
        self.class_names = tuple(map(str, names))
        self.data = _of_run(meta["config"]["data"]) if "config" in meta else _of_card(self.name)
        if image_size is not None:
            self.data.image_size = image_size
        self.data.validate()

        graphdef, *self._arrays = split(model)

        def forward(arrays: Any, images: jax.Array) -> jax.Array:
            logits = merge(graphdef, *arrays)(normalize(images, self.data.mean, self.data.std))
            return jax.nn.softmax(logits.astype(jnp.float32))

        self._forward = jax.jit(forward)

    def view(self, image: Image.Image) -> np.ndarray:
        """Return an image as the model sees it.

        Unlike in an evaluation, a photograph is turned upright as its EXIF says, and what is transparent is white.

        Args:
            image: of any size and mode.

        Returns:
            uint8 (image_size, image_size, C).
        """
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.asarray(image.convert("RGB" if self.data.in_channels == 3 else "L"))
        return eval_crop(pixels.reshape(*pixels.shape[:2], -1), self.data)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes.

        Args:
            images: uint8 (B, H, W, C), as ``view`` gives them.

        Returns:
            float32 (B, K).
        """
        size = min(BATCH, len(images))
        found = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filling = ((0, size - len(batch)), *((0, 0),) * 3)  # the last batch as long as the others: one program
            found.append(np.asarray(self._forward(self._arrays, np.pad(batch, filling)))[: len(batch)])
        return np.concatenate(found)


def _of_card(name: str) -> DataConfig:
    card = model_card(name)
    return DataConfig(
        image_size=card.input_size[0],
        crop_pct=card.crop,
        crop_mode=card.crop_mode,
        eval_interpolation=card.interpolation,
        mean=card.mean,
        std=card.std,
    )


def _of_run(data: dict[str, Any]) -> DataConfig:
    fields = ("image_size", "in_channels", "crop_pct", "crop_mode", "eval_interpolation", "mean", "std")
    return DataConfig(**{field: data[field] for field in fields})


def read_image(path: str | PathLike[str]) -> Image.Image:
    """Read an image file.

    Raises:
        UserError: it is missing, damaged, or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"image {path} cannot be read: {reason}") from error


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.predict") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="Say what images show, in words, and draw it.")
    parser.add_argument("--model", default="", metavar="NAME", help="the model; not needed for a folder that names it")
    parser.add_argument(
        "--weights", required=True, metavar="FILE_OR_DIR", help="official weights, a converted model, or a training run"
    )
    parser.add_argument(
        "--ema",
        choices=EMA_WORDS,
        default="better",
        help="whether to take a run's moving average (default: where its evaluation found it better)",
    )
    parser.add_argument("--top", type=int, default=5, metavar="N", help="most probable classes to name (5)")
    parser.add_argument("--out", type=Path, default=Path("prediction.png"), metavar="PNG", help="(prediction.png)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side in pixels, where it is to be another")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line in label order")
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    return cli.main(lambda: _predict(parser.parse_args(argv)))


def _predict(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be 1 or more")
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} must end in .png")
    for path in args.images:
        if not Path(path).is_file():
            raise UserError(f"there is no image file {path}")
    predictor = Predictor(
        args.weights,
        args.model,
        ema=EMA_WORDS[args.ema],
        image_size=args.image_size,
        class_names=args.classes and _read_classes(args.classes),
    )
    images = np.stack([predictor.view(read_image(path)) for path in args.images])
    with storage_errors(args.out.parent):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    probabilities, names = predictor(images), predictor.class_names
    print(f"weights: {predictor.taken}")
    for path, shares in zip(args.images, probabilities, strict=True):
        print(path)
        for k in np.argsort(-shares, kind="stable")[: args.top]:
            print(f"  {shares[k]:7.2%}  {k:>4}" + (f"  {names[k]}" if names[k] != str(k) else ""))
    drawn = slice(DRAWN)
    titles = [Path(path).name for path in args.images]
    guesses(args.out, images[drawn], titles[drawn], probabilities[drawn], names, args.top)
    print(f"{args.out} shows " + ("them" if len(images) <= DRAWN else f"the first {DRAWN}"))


def _read_classes(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


if __name__ == "__main__":
    sys.exit(main())
