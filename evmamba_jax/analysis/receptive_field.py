"""Effective receptive fields: ``python -m evmamba_jax.analysis receptive-field MODEL ... [--images PLACE ...]``.

How much each pixel of an image moves the middle of a stage's map, on the mean of several images.

Source: Luo et al., Understanding the Effective Receptive Field in Deep Convolutional Neural Networks
(arXiv:1701.04128), in the form of RepLKNet's ``erf/visualize_erf.py``, which VMamba's figures take over.
"""

import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from tqdm import tqdm

from evmamba_jax import cli
from evmamba_jax.analysis.model_maps import batches, maps_of, stage_number, take_apart
from evmamba_jax.analysis.subjects import IMAGES_HELP, MODEL_HELP, Subject, open_subject, photographs, png
from evmamba_jax.answers import Picture
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.device import normalize
from evmamba_jax.data.transforms import train_view
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.preprocessing import pixels, view
from evmamba_jax.reports.drawing import GREY, draws_names, save, short
from evmamba_jax.storage import written_whole

# Shares of the gradient whose area is told, as RepLKNet's and VMamba's tables do.
SHARES = (0.2, 0.3, 0.5, 0.99)
_FUNCTION = re.compile(r"(.+\.py):(\w+)")
_COLOURS = "viridis"
_SEED = 0  # of the noise, and of which pictures and crops are taken


class ReceptiveField(NamedTuple):
    """How much each pixel moves the middle of a map.

    Attributes:
        map: (H, W) float64, the mean over images of the gradient; its scale is the model's own.
        area_shares: for each of ``SHARES`` of the gradient, the share of the image's area that holds it; see
            :func:`area_shares`.
        stage: number of the stage, from 0.
        images: how many the mean is over.
        skipped: images that were left out because their gradient is no number.
    """

    map: np.ndarray
    area_shares: dict[float, float]
    stage: int
    images: int
    skipped: int


def effective_receptive_field(
    model: Any, images: Iterable[np.ndarray], *, stage: int = -1, batch_size: int = 1
) -> ReceptiveField:
    """Return how much each pixel of an image moves the middle of a stage's map.

    Of each image: the sum over channels of ReLU of the map at its middle (h // 2, w // 2), the gradient with respect to
    the image, ReLU of that, and the sum over colours; then the mean over images.

    Args:
        model: one of ours, of which every map that ``features`` gives is a stage; or a JAX function of images
            (B, H, W, C) that returns a map (B, h, w, C'), each image by itself, or a list of maps.
        images: (H, W, C) normalised floats, all of one shape: an array (N, H, W, C), or what makes them one by one.
        stage: number of the map, from 0; negative numbers count from the last.
        batch_size: images at a time; what is kept for the gradient grows with it.

    Returns:
        The map (H, W), and the shares of the area.

    Raises:
        UserError: no images; images of another form, or too small for the model; no such stage; a function that fails
            or gives no maps; no image has a gradient that is a number, or all are zero.
    """
    apart = take_apart(model)
    number = 0

    def middle(images: jax.Array, arrays: Any) -> tuple[jax.Array, jax.Array]:
        nonlocal number
        maps = maps_of(apart.build(arrays), images)
        number = stage_number(stage, len(maps))
        x = maps[number]
        x = x[:, x.shape[1] // 2, x.shape[2] // 2].astype(jnp.promote_types(x.dtype, jnp.float32))
        # Images do not meet, so that the gradient of the sum over them is each one's own.
        return jax.nn.relu(x).sum(), x.sum(-1)

    @jax.jit
    def gradients(images: jax.Array, arrays: Any) -> jax.Array:
        gradient, middles = jax.grad(middle, has_aux=True)(images, arrays)
        # To ReLU's gradient what is no number is not above zero.
        return jnp.where(jnp.isfinite(middles)[:, None, None], jax.nn.relu(gradient).sum(-1), jnp.nan)

    total, counted, skipped = np.zeros(()), 0, 0
    for batch, count in batches(images, batch_size):
        for gradient in np.asarray(gradients(batch, apart.arrays), np.float64)[:count]:
            if np.isfinite(gradient).all():
                total, counted = total + gradient, counted + 1
            else:
                skipped += 1
    if not counted:
        raise UserError(f"the gradient of every image ({skipped}) is no number: the model overflows, or its weights do")
    return ReceptiveField(total / counted, area_shares(total), number, counted, skipped)


def area_shares(gradient: np.ndarray, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """Return the share of an image's area that holds each share of a gradient.

    The area is that of the smallest square around the pixel (H // 2, W // 2), an odd number of pixels wide, that holds
    at least so much; beyond the image it is cut off. RepLKNet's ``analyze_erf.py`` takes the same squares, but of
    ``log10(gradient + 1)``, whose shares depend on the gradient's scale, and begins with 3 pixels.

    Args:
        gradient: (H, W), zero or more.
        shares: of the sum, above 0, at most 1.

    Raises:
        UserError: a gradient that is zero everywhere.
    """
    held, area = _rings(gradient)
    return {share: float(area[np.searchsorted(held, share)]) for share in shares}


def _rings(gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of gradient and area in squares that reach 0, 1, ... pixels from the middle."""
    if not gradient.any():
        raise UserError("no gradient reaches the images: the map is zero or less in its middle, or does not see them")
    rows, columns = (np.abs(np.arange(side) - side // 2) for side in gradient.shape)
    away = np.maximum(rows[:, None], columns).ravel()
    held = np.cumsum(np.bincount(away, gradient.ravel()))
    return held / held[-1], np.cumsum(np.bincount(away)) / gradient.size


@draws_names
def draw_receptive_fields(path: Path, fields: Sequence[tuple[str, ReceptiveField]]) -> None:
    """Draw receptive fields side by side, each as (gradient / maximum)^0.2, with the squares of ``SHARES``.

    Args:
        path: the picture, a .png file.
        fields: title and receptive field of each panel.
    """
    across = min(3, len(fields))
    down = -(-len(fields) // across)
    figure = Figure(figsize=(3.2 * across + 1.0, 3.8 * down + 0.7), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, (title, field) in zip(panels, fields, strict=False):
        shown = (field.map / field.map.max()) ** 0.2
        axes.imshow(shown, cmap=_COLOURS, vmin=0, vmax=1)
        height, width = field.map.shape
        axes.set_title(
            f"{short(title, 36)}\nstage {field.stage}, {_counted(field.images)}", fontsize=9.5, linespacing=1.35
        )
        axes.set_xticks([0, width // 2, width - 1])
        axes.set_yticks([0, height // 2, height - 1])
        axes.tick_params(labelsize=7.5, colors=GREY)
        told = [f"{100 * area:.{0 if area >= 0.1 else 1}f}" for area in field.area_shares.values()]
        axes.set_xlabel(f"squares: {', '.join(told)} % of the area", fontsize=9)
        _draw_squares(axes, field.map)
    panels[0].set_ylabel("pixels", fontsize=8, color=GREY)
    for axes in panels[len(fields) :]:
        axes.axis("off")
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), _COLOURS), ax=panels.tolist(), shrink=0.8, pad=0.015, aspect=30
    )
    bar.set_label("fifth root of the gradient over its maximum", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    handles = [Line2D([], [], color="black", linewidth=1.3, linestyle=style) for style in _STYLES]
    labels = [f"{share:.0%}" for share in SHARES]
    figure.legend(
        handles,
        labels,
        title="squares that hold this share of the gradient",
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
    save(figure, path)


_STYLES = ((0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (4, 1.5)), "solid")


def _draw_squares(axes: Axes, gradient: np.ndarray) -> None:
    height, width = gradient.shape
    held, _ = _rings(gradient)
    outline: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.6, foreground="#000000a0")]
    for share, style in zip(SHARES, _STYLES, strict=True):
        reach = int(np.searchsorted(held, share))
        left, top = (max(side // 2 - reach, 0) - 0.5 for side in (width, height))
        right, bottom = (min(side // 2 + reach + 1, side) - 0.5 for side in (width, height))
        corner = {"width": right - left, "height": bottom - top}
        square = Rectangle((left, top), **corner, fill=False, edgecolor="white", linewidth=1.2, linestyle=style)
        square.set_path_effects(outline)
        square.set_clip_on(False)
        axes.add_patch(square)


def _counted(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis receptive-field") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(prog=prog, description="How much each pixel moves the middle of a stage's map (Luo et al.).")
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=f"{MODEL_HELP}; or FILE.py:FUNCTION, a JAX function of images (B, H, W, 3), normalised as ImageNet's, "
        "that returns a map (B, h, w, C)",
    )
    parser.add_argument("--images", nargs="+", default=[], metavar="IMAGE_OR_FOLDER", help=IMAGES_HELP)
    parser.add_argument(
        "--count", type=int, default=50, metavar="N", help="images to take the mean of, as many as the papers (50)"
    )
    parser.add_argument("--noise", action="store_true", help="standard normal noise in place of pictures")
    parser.add_argument("--size", type=int, metavar="S", help="side of the images, pixels (default: each model's own)")
    parser.add_argument("--stage", type=int, default=-1, metavar="K", help="from 0, or -1 for the last (-1)")
    parser.add_argument("--out", type=png, default=Path("receptive_field.png"), metavar="PNG", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="JSON", help="also write the shares of the area")
    return cli.main(lambda: _look(parser.parse_args(argv)))


def _look(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UserError(f"--count is {args.count}; it must be 1 or more")
    if args.noise and args.images:
        raise UserError("--noise takes no pictures: leave --images out, or --noise")
    subjects = [_open(given, args.size) for given in args.models]
    pictures = [] if args.noise else photographs(args.images)
    if args.noise:
        print(f"{args.count} images of noise")
    elif len(pictures) < args.count:
        told = f"{len(pictures)} picture{'s' if len(pictures) > 1 else ''} for {args.count} images"
        print(f"{told}: the others are random crops of them, the same in every run")
    fields = []
    for number, subject in enumerate(subjects):
        images = _noise(subject.data, args.count) if args.noise else _normalised(pictures, subject.data, args.count)
        shown = tqdm(images, total=args.count, desc=subject.label, unit=" images", leave=False, disable=None)
        field = effective_receptive_field(subject.model, shown, stage=args.stage)
        fields.append((subject.label, field))
        if not number:
            columns = "  ".join(f"{share:>5.0%}" for share in SHARES)
            print(f"{'area that holds, of the gradient:':<36}  {columns}")
        areas = "  ".join(f"{100 * area:>4.1f}%" for area in field.area_shares.values())
        side = field.map.shape[0]
        print(f"{subject.label:<20} stage {field.stage}, {side:>4} px  {areas}", flush=True)
        if field.skipped:
            print(f"{subject.label}: left out {_counted(field.skipped)} whose gradient is no number", file=sys.stderr)
    draw_receptive_fields(args.out, fields)
    if args.json:
        with written_whole(args.json) as beside:
            beside.write_text(json.dumps([_noted(*one, args.noise) for one in fields], indent=1) + "\n")
    print(f"drawn: {args.out}")


def _noted(label: str, field: ReceptiveField, noise: bool) -> dict[str, Any]:
    """Return what is written of a receptive field; areas are shares of the image's."""
    return {
        "model": label,
        "stage": field.stage,
        "image_size": field.map.shape[0],
        "images": field.images,
        "skipped": field.skipped,
        "of": "noise" if noise else "pictures",
        "area_shares": {f"{share:g}": area for share, area in field.area_shares.items()},
    }


def _open(given: str, image_size: int | None) -> Subject:
    found = _FUNCTION.fullmatch(given)
    if found is None:
        return open_subject(given, image_size=image_size)
    data = DataConfig()
    if image_size is not None:
        data.image_size = image_size
    data.validate()
    return Subject(given, found[2], _function(Path(found[1]), found[2]), data, (), f"the function {found[2]}")


def _function(file: Path, name: str) -> Any:
    """Import a function from a file; raises a UserError where that cannot be."""
    if not file.is_file():
        raise UserError(f"there is no file {file}, which {file}:{name} names")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}") from error
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{file} has no function {name}{nearest(name, own)}")
    return function


def _noise(data: DataConfig, count: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(_SEED)
    for _ in range(count):
        yield random.standard_normal((data.image_size, data.image_size, data.in_channels), np.float32)


def _normalised(pictures: Sequence[Picture], data: DataConfig, count: int) -> Iterator[np.ndarray]:
    for image in _seen(pictures, data, count):
        yield np.asarray(normalize(jnp.asarray(image[None]), data.mean, data.std))[0]


def _seen(pictures: Sequence[Picture], data: DataConfig, count: int) -> Iterator[np.ndarray]:
    """Yield ``count`` views, uint8 (S, S, C): of as many pictures by chance, and where they are fewer crops of them."""
    random = np.random.default_rng(_SEED)
    read: list[Picture] = []
    for number in random.permutation(len(pictures)):
        if len(read) == count:
            return
        try:
            image = view(pictures[number].file, data)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        read.append(pictures[number])
        yield image
    if not read:
        raise UserError("no image can be read: name others with --images, or take --noise")
    for number in range(count - len(read)):
        yield train_view(pixels(read[number % len(read)].file, data), data, random)
