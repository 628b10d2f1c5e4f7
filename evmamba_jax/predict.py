"""Say what images show, in words, and draw it.

    python -m evmamba_jax.predict --model evmamba_t --weights efficient_vmamba_tiny.ckpt china.jpg flower.jpg
    python -m evmamba_jax.predict --weights runs/digits --top 3 --out digits.png --csv digits.csv FOLDER

Images are prepared as the model's card says, those for the model of a training run as that run evaluates.
"""

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax import cli
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.decoding import looks_like_image
from evmamba_jax.data.device import normalize
from evmamba_jax.data.files import Folder
from evmamba_jax.data.imagenet import imagenet_classes
from evmamba_jax.errors import UserError, printable
from evmamba_jax.models import model_card
from evmamba_jax.preprocessing import of_card, of_run, view
from evmamba_jax.reports.contact_sheet import contact_sheet, thumbnail
from evmamba_jax.reports.predictions import guesses
from evmamba_jax.storage import storage_errors, written_whole
from evmamba_jax.weights.load import EMA_WORDS, Ema, open_place

BATCH = 32  # images that the model sees at a time
DRAWN = 24  # images in the picture


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
        self.data = of_run(meta["config"]["data"]) if "config" in meta else of_card(model_card(self.name))
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
    parser.add_argument("--csv", type=Path, metavar="CSV", help="also write the answers, a line an image")
    parser.add_argument(
        "--embeddings", type=Path, metavar="NPZ", help="also write what enters the head: images (N,), embeddings (N, D)"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw all images small, by the class found")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a folder, all images in it and below")
    return cli.main(lambda: _predict(parser.parse_args(argv)))


def _predict(args: argparse.Namespace) -> None:
    if args.top < 1:
        raise UserError(f"--top is {args.top}; it must be 1 or more")
    for option, ending in (("out", ".png"), ("sheet", ".png"), ("embeddings", ".npz")):
        file = getattr(args, option)
        if file is not None and file.suffix != ending:
            raise UserError(f"--{option} {file} must end in {ending}")
    predictor = Predictor(
        args.weights,
        args.model,
        ema=EMA_WORDS[args.ema],
        image_size=args.image_size,
        class_names=args.classes and _read_classes(args.classes),
    )
    for file in filter(None, (args.out, args.csv, args.embeddings, args.sheet)):
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
    names, top = predictor.class_names, min(args.top, len(predictor.class_names))
    with contextlib.ExitStack() as stack:
        table = stack.enter_context(_table(args.csv, top)) if args.csv else None
        answered, left_out, drawn = 0, [], []
        named: list[str] = []
        vectors: list[np.ndarray] = []
        thumbnails: list[tuple[np.ndarray, int, float]] = []
        for titles, views in _read(predictor, _paths(args.images), left_out):
            probabilities, embeddings = predictor.answers(views)
            if args.embeddings:
                named += titles
                vectors.append(embeddings)
            if args.sheet:
                found = probabilities.argmax(1)
                thumbnails += zip(map(thumbnail, views), found.tolist(), probabilities.max(1).tolist(), strict=True)
            if not answered:
                print(f"weights: {predictor.taken}")
            answered += len(titles)
            drawn += list(zip(views, titles, probabilities, strict=True))[: DRAWN - len(drawn)]
            for path, shares in zip(titles, probabilities, strict=True):
                best = np.argsort(-shares, kind="stable")[:top]
                print(printable(path))
                for k in best:
                    print(f"  {shares[k]:7.2%}  {k:>4}" + (f"  {printable(names[k])}" if names[k] != str(k) else ""))
                if table is not None:
                    table.writerow([path, *(cell for k in best for cell in (k, names[k], f"{shares[k]:.6f}"))])
        if not answered:
            raise UserError(f"no image can be read: {'; '.join(left_out[:3])}")
    shown = [np.stack(column) for column in zip(*((v, p) for v, _, p in drawn), strict=True)]
    guesses(args.out, shown[0], [Path(title).name for _, title, _ in drawn], shown[1], names, top)
    print(f"{args.out} shows " + ("them" if answered <= DRAWN else f"the first {DRAWN}"))
    if args.embeddings:
        with written_whole(args.embeddings) as beside, beside.open("wb") as file:
            np.savez(file, images=np.array(named), embeddings=np.concatenate(vectors))
        print(f"{args.embeddings}: embeddings of {answered} images, {vectors[0].shape[1]} numbers each")
    if args.sheet:
        contact_sheet(args.sheet, thumbnails, names)
        print(f"{args.sheet}: all of them, by the class found")
    if left_out:
        print(f"left out: {len(left_out)} of {answered + len(left_out)}", file=sys.stderr)
        for line in left_out:
            print(f"  {line}", file=sys.stderr)


def _paths(given: Sequence[str]) -> Iterator[Path]:
    """Return the files: as given, and of folders all images in them and below, sorted."""
    for name in given:
        path = Path(name)
        if not path.is_dir():
            yield path
            continue
        images = [path / inside for inside in Folder(path).find().names if _is_image(path / inside)]
        if not images:
            raise UserError(f"there are no images in the folder {path}")
        yield from images


def _is_image(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return looks_like_image(file.read(4096))
    except OSError:
        return True  # so that it is said to be left out


def _read(predictor: Predictor, paths: Iterable[Path], left_out: list[str]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield names and views of so many images as the model sees at a time; note which cannot be read, and why."""
    titles, views = [], []
    for path in paths:
        try:
            views.append(predictor.view(path))
            titles.append(str(path))
        except UserError as error:
            left_out.append(str(error))
        if len(views) == BATCH:
            yield titles, np.stack(views)
            titles, views = [], []
    if views:
        yield titles, np.stack(views)


@contextlib.contextmanager
def _table(path: Path, top: int) -> Iterator[Any]:
    """Open a table for the answers: the image, then class, name and probability of each of the most probable."""
    with written_whole(path) as file, open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        table = csv.writer(out)
        table.writerow(["image", *(f"{what}_{i + 1}" for i in range(top) for what in ("class", "name", "probability"))])
        yield table


def _read_classes(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


if __name__ == "__main__":
    sys.exit(main())
