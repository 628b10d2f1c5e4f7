"""Grad-CAM: ``python -m evmamba_jax.analysis grad-cam MODEL IMAGE ... [--class NAME_OR_NUMBER]``.

Where in an image a model finds what speaks for a class.

Source: Selvaraju et al., Grad-CAM (arXiv:1610.02391), section 3.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from evmamba_jax import cli
from evmamba_jax.analysis.model_maps import batches, stage_number, take_apart
from evmamba_jax.analysis.subjects import IMAGES_HELP, MODEL_HELP, open_subject, photographs, png, views
from evmamba_jax.data.device import normalize
from evmamba_jax.errors import UserError, nearest, printable
from evmamba_jax.layers.backbone import Backbone, PlainBackbone
from evmamba_jax.models.vim import CLASS_TOKEN_AT
from evmamba_jax.reports.drawing import blank, draws_names, numbered, save, short, show

_COLOURS = "inferno"  # from dark to light: to be read without colours too


class GradCam(NamedTuple):
    """What speaks for a class, and where.

    Attributes:
        maps: (B, h, w) float64, zero or more; only the places and sizes within one image can be compared.
        classes: (B,) integers, the class that each map is of.
        logits: (B, K) float64.
    """

    maps: np.ndarray
    classes: np.ndarray
    logits: np.ndarray


def grad_cam(
    model: Any, images: np.ndarray, class_index: ArrayLike | None = None, *, stage: int = -1, batch_size: int = 8
) -> GradCam:
    """Return where in images a model finds what speaks for a class.

    ReLU of the sum over the channels of a stage's map, each times the mean over pixels of the gradient of the class's
    logit with respect to it.

    The stages of Vim and CourseVim are the quarters of their blocks. In Vim with a class token the head sees this token
    alone, which the last block has fed: its last map is the one that enters the last block, and the class token's own
    gradient stays out of the mean.

    Args:
        model: one of ours, with a head.
        images: (B, H, W, C) normalised floats.
        class_index: the class of all images, or (B,) one an image; None: for each image the one with the highest logit.
        stage: number of the map, from 0; negative numbers count from the last.
        batch_size: images at a time.

    Raises:
        UserError: a model of another kind or without a head; no images, or images of another form; no such stage or
            class; logits that are no numbers.
    """
    if not isinstance(model, Backbone):
        raise UserError(f"Grad-CAM is for the classifiers of this library, not for {type(model).__name__}")
    head: Any = getattr(model, "head", None)
    if head is None:
        raise UserError("the model has no head, so that it tells no classes: take one with num_classes above 0")
    classes = head.bias.get_value().size
    number = stage_number(stage, _stages(model))
    wanted = _wanted(class_index, len(images), classes)
    apart = take_apart(model)

    @jax.jit
    def cams(images: jax.Array, wanted: jax.Array, arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = _map(apart.build(arrays), images, number)

        def logits(shift: jax.Array) -> jax.Array:
            return _shifted(apart.build(arrays), number, shift)(images)

        found, pull = jax.vjp(logits, jnp.zeros(_entering(model, x), x.dtype))
        chosen = jnp.where(wanted < 0, found.argmax(-1), wanted)
        (gradient,) = pull(jax.nn.one_hot(chosen, classes, dtype=found.dtype))
        gradient = _without_class_token(model, gradient)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        weights = gradient.astype(wide).mean(range(1, gradient.ndim - 1))
        return jax.nn.relu(jnp.einsum("bhwc,bc->bhw", x.astype(wide), weights)), chosen, found

    parts, start = [], 0
    for batch, count in batches(images, batch_size):
        own = np.full(batch_size, -1)
        own[:count] = wanted[start : start + count]
        parts.append([np.asarray(array)[:count] for array in cams(batch, own, apart.arrays)])
        start += count
    maps, chosen, found = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    lost = np.flatnonzero(~np.isfinite(found).all(-1) | ~np.isfinite(maps).all((1, 2)))
    if len(lost):
        raise UserError(
            f"logits or map of image {lost[0]} are no numbers: the image has such pixels, or the model overflows"
        )
    return GradCam(maps.astype(np.float64), chosen, found.astype(np.float64))


def _wanted(class_index: ArrayLike | None, images: int, classes: int) -> np.ndarray:
    """Return the class of each image, (B,), -1 for the predicted one."""
    if class_index is None:
        return np.full(images, -1)
    given = np.asarray(class_index)
    if not np.issubdtype(given.dtype, np.integer) or given.shape not in ((), (images,)):
        raise UserError(
            f"class_index is {given.dtype} of shape {given.shape}; one integer, or one for each of {images} images"
        )
    for index in given.ravel():
        if not 0 <= index < classes:
            raise UserError(f"there is no class {index}; allowed: 0 to {classes - 1}")
    return np.broadcast_to(given, images)


# The logit as a function of a map: what takes the map in the model takes it plus a shift, and at zero the gradient with
# respect to the shift is the one with respect to the map.


class _Shift(nnx.Module):
    """Adds a shift to what enters a layer; alone, a block that does nothing else."""

    def __init__(self, shift: jax.Array, layer: Any = None):
        self.shift = nnx.Variable(shift)
        self.layer = layer

    def __call__(self, x: jax.Array, *args: Any, **given: Any) -> jax.Array:
        x = x + self.shift[...]
        return x if self.layer is None else self.layer(x, *args)


def _is_plain(model: Any) -> bool:
    return isinstance(model, PlainBackbone)


def _stages(model: Any) -> int:
    return len(model.quarters if _is_plain(model) else model.stages)


def _has_class_token(model: Any) -> bool:
    return getattr(model.config, "class_token", False)


def _end(model: PlainBackbone, stage: int) -> int:
    """Return after how many blocks the map of a stage is taken."""
    end = model.quarters[stage]
    return end - 1 if _has_class_token(model) and end == len(model.blocks) else end


def _map(model: Any, images: jax.Array, stage: int) -> jax.Array:
    """Return the map (B, h, w, C) of a stage; the model is changed."""
    if _is_plain(model):
        model.blocks = nnx.List(model.blocks[: _end(model, stage)])
        return model.features(images)[-1]
    return model.features(images)[stage]


def _shifted(model: Any, stage: int, shift: jax.Array) -> Any:
    """Return the model with a shift of the map of a stage; the model is changed."""
    if _is_plain(model):
        end = _end(model, stage)
        model.blocks = nnx.List([*model.blocks[:end], _Shift(shift), *model.blocks[end:]])
    elif stage + 1 < len(model.stages):
        model.stages[stage].downsample = _Shift(shift, model.stages[stage].downsample)
    else:
        model.norm = _Shift(shift, model.norm)
    return model


def _entering(model: Any, x: jax.Array) -> tuple[int, ...]:
    """Return the shape of the shift for a map (B, h, w, C): of its tokens in a plain model."""
    if not _is_plain(model):
        return x.shape
    return x.shape[0], x.shape[1] * x.shape[2] + _has_class_token(model), x.shape[3]


def _without_class_token(model: Any, gradient: jax.Array) -> jax.Array:
    if not _has_class_token(model):
        return gradient
    return jnp.delete(gradient, CLASS_TOKEN_AT["middle"](gradient.shape[1] - 1), axis=1)


@draws_names
def draw_grad_cams(path: Path, examples: Sequence[tuple[np.ndarray, np.ndarray, str]]) -> None:
    """Draw each image, and beside it its map over it, from zero to the map's own maximum.

    Args:
        path: the picture, a .png file.
        examples: image uint8 (H, W, C), map (h, w), and a title, for each.
    """
    pairs = min(2, len(examples))
    rows = -(-len(examples) // pairs)
    figure = Figure(figsize=(5.2 * pairs + 0.8, 2.9 * rows + 0.35), dpi=110, layout="constrained")
    grid = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axes in grid.flat:
        blank(axes)
    for (image, cam, title), (left, right) in zip(examples, grid.reshape(-1, 2), strict=False):
        show(left, image)
        left.set_title(title, loc="left", fontsize=9, linespacing=1.35)
        _draw_over(right, image, cam)
    scale = ScalarMappable(Normalize(0, 1), _COLOURS)
    bar = figure.colorbar(scale, ax=grid.ravel().tolist(), shrink=0.8, pad=0.015, aspect=30, ticks=[0, 1])
    bar.ax.set_yticklabels(["0", "the image's\nmaximum"], fontsize=8)
    save(figure, path)


def _draw_over(axes: Axes, image: np.ndarray, cam: np.ndarray) -> None:
    """Draw a map over an image, which becomes grey and dark so that colours and light are the map's alone."""
    show(axes, 0.6 * image[..., :3].mean(-1, keepdims=True))
    over = cam / (cam.max() or 1)
    colours = matplotlib.colormaps[_COLOURS](over)
    colours[..., 3] = 0.85 * over**0.5  # where nothing speaks for the class, the image is seen
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    axes.imshow(colours, interpolation="bilinear", extent=extent)


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis grad-cam") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="Draw where in images a model finds what speaks for a class (Grad-CAM).")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("images", nargs="*", metavar="IMAGE_OR_FOLDER", help=IMAGES_HELP)
    parser.add_argument(
        "--class",
        dest="wanted",
        metavar="NAME_OR_NUMBER",
        help="the class, by its name or number (default: of each image the one found most probable)",
    )
    parser.add_argument("--stage", type=int, default=-1, metavar="K", help="from 0, or -1 for the last (-1)")
    parser.add_argument("--size", type=int, metavar="S", help="side of the images in pixels (default: the model's own)")
    parser.add_argument("--out", type=png, default=Path("grad_cam.png"), metavar="PNG", help="(%(default)s)")
    return cli.main(lambda: _look(parser.parse_args(argv)))


def _look(args: argparse.Namespace) -> None:
    subject = open_subject(args.model, image_size=args.size)
    wanted = None if args.wanted is None else class_of(args.wanted, subject.class_names)
    pictures, seen = views(photographs(args.images), subject.data)
    images = np.asarray(normalize(jnp.asarray(seen), subject.data.mean, subject.data.std))
    found = grad_cam(subject.model, images, wanted, stage=args.stage)
    print(f"weights: {subject.taken}")
    examples = []
    for picture, image, cam, index, logits in zip(pictures, seen, *found, strict=True):
        probability = float((jax.nn.sigmoid if subject.several else jax.nn.softmax)(logits)[index])
        told = f"{numbered(index, subject.class_names, 30)}, {probability:.1%}"
        nowhere = "" if cam.any() else "; nothing in this map speaks for it"
        print(f"{printable(str(picture.file))}: {told}{nowhere}")
        examples.append((image, cam, f"{short(str(picture.inside), 30)}\n{told}"))
    draw_grad_cams(args.out, examples)
    print(f"drawn: {args.out}")


def class_of(given: str, names: Sequence[str]) -> int:
    """Return the class that a name, one of its synonyms between commas, or a number means.

    Raises:
        UserError: there is none, or there are several of this name.
    """
    own = given.strip().casefold()
    synonyms = [{name.casefold(), *(part.strip() for part in name.casefold().split(","))} for name in names]
    found = [index for index, known in enumerate(synonyms) if own in known]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"several classes are called {given!r}: give a number, one of {', '.join(map(str, found))}")
    if own.isdecimal() and int(own) < len(names):
        return int(own)
    near = nearest(own, {name for known in synonyms for name in known})
    raise UserError(f"there is no class {given!r}{near}; allowed: a number from 0 to {len(names) - 1}, or a name")
