"""Which map fires where: ``python -m evmamba_jax.analysis stages MODEL [IMAGE ...]``."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from evmamba_jax import cli
from evmamba_jax.analysis.subjects import IMAGES_HELP, MODEL_HELP, Subject, open_subject, photographs, png, views
from evmamba_jax.answers import SCORE
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.device import normalize
from evmamba_jax.data.mmseg import pixels_of
from evmamba_jax.data.opencv import size_of
from evmamba_jax.detection.boxes import clip
from evmamba_jax.detection.evaluate import Found
from evmamba_jax.detection.per_anchor import CODER
from evmamba_jax.detection.rcnn import RCNN
from evmamba_jax.detection.regions import levels_of
from evmamba_jax.detection.retinanet import RetinaNet
from evmamba_jax.errors import UserError
from evmamba_jax.models.registry import VARIANTS
from evmamba_jax.preprocessing import named, pixels
from evmamba_jax.reports.drawing import COLOURS, blank, draws_names, save, short, show
from evmamba_jax.storage import storage_errors
from evmamba_jax.tasks.opening import open_composed
from evmamba_jax.weights.load import is_composed

_IMAGES = 6  # in the picture


class StageMaps(NamedTuple):
    """Where the maps of a model fire in one image.

    Attributes:
        image: uint8 (H, W, C), as the model sees it, without padding.
        names: of the maps: "stage 1" and so on, of a backbone; "level 1" and so on, of a detector's pyramid.
        maps: float32 (h, w) of each: mean absolute activation over channels, of the cells that begin in the image.
        strides: (2,) of each map: pixels from one cell to the next, down and across.
        found: what a detector finds, in pixels of ``image``; None of other models.
        levels: int (D,), the level that each of its boxes comes from, 0 the first; None of other models.
    """

    image: np.ndarray
    names: tuple[str, ...]
    maps: list[np.ndarray]
    strides: list[tuple[float, float]]
    found: Found | None = None
    levels: np.ndarray | None = None


def stage_maps(subject: Subject, image: np.ndarray) -> StageMaps:
    """Return where the stages of a classifier fire.

    Args:
        subject: the model.
        image: uint8 (S, S, C), as :func:`evmamba_jax.analysis.subjects.views` prepares it.
    """
    graphdef, *arrays = split(subject.model)

    @jax.jit
    def forward(arrays: Any, images: jax.Array) -> list[jax.Array]:
        stages = merge(graphdef, *arrays).features(normalize(images, subject.data.mean, subject.data.std))
        return [_strength(x) for x in stages]

    maps = jax.device_get(forward(arrays, image[None]))
    return StageMaps(image, *_named({"stage": [x[0] for x in maps]}, size_of(image), size_of(image)))


def _strength(x: jax.Array) -> jax.Array:
    """Return the mean absolute activation (B, h, w) of a map (B, h, w, C)."""
    return jnp.abs(x.astype(jnp.float32)).mean(-1)


def _named(
    groups: dict[str, list[np.ndarray]], padded: tuple[int, int], size: tuple[int, int]
) -> tuple[tuple[str, ...], list[np.ndarray], list[tuple[float, float]]]:
    """Return names, maps without what lies in the padding, and strides."""
    names, maps, strides = [], [], []
    for group, own in groups.items():
        for number, x in enumerate(own, 1):
            down, across = padded[0] / x.shape[0], padded[1] / x.shape[1]
            names.append(f"{group} {number}")
            strides.append((down, across))
            maps.append(x[: int(np.ceil(size[0] / down)), : int(np.ceil(size[1] / across))])
    return tuple(names), maps, strides


def dense_stage_maps(task: Any, model: Any) -> Callable[[np.ndarray], StageMaps]:
    """Return a function that tells of an image where stages and levels of a segmenter or detector fire.

    Args:
        task: as :func:`evmamba_jax.tasks.opening.open_composed` opens it.
        model: the same.

    Returns:
        From a picture, uint8 (H, W, 3), to its maps; each shape takes a program of its own.
    """
    graphdef, *arrays = split(model)

    @jax.jit
    def forward(arrays: Any, batch: Any) -> tuple[dict[str, list[jax.Array]], Any]:
        model = merge(graphdef, *arrays)
        maps = model.backbone.features(task.normalized(batch))
        groups = {"stage": [_strength(x)[0] for x in maps]}
        if task.kind != "boxes":
            return groups, None
        maps = maps if model.pyramid is None else model.pyramid(maps)
        levels = maps if model.neck is None else model.neck(maps)
        groups["level"] = [_strength(x)[0] for x in levels]
        return groups, (task.answers(model, batch), _candidates(model, model.outputs(maps), batch["size"]))

    def told(image: np.ndarray) -> StageMaps:
        example = task.unlabelled(image, task.data.eval_padding)
        batch = {name: np.expand_dims(array, 0) for name, array in example.items()}
        groups, detected = jax.device_get(forward(arrays, batch))
        seen = example["image"][: example["size"][0], : example["size"][1]]
        groups = {group: groups[group] for group in sorted(groups, reverse=True)}  # as JAX returns them: levels first
        maps = _named(groups, size_of(example["image"]), size_of(seen))
        if detected is None:
            return StageMaps(seen, *maps)
        answers, candidates = detected
        found = task.found(jax.tree.map(lambda array: array[0], answers), size_of(image))
        found = Found(*found[:3]).scaled(example["scale"])
        return StageMaps(seen, *maps, found, _levels(found, candidates))

    return told


class _Candidates(NamedTuple):
    """The boxes among which a detector's detections are.

    Attributes:
        boxes: (M, K, 4), or (M, 1, 4) where one box serves all classes.
        levels: int (M,).
        scores: (M, K); None where boxes tell enough.
    """

    boxes: Any
    levels: Any
    scores: Any


def _candidates(model: Any, outputs: Any, sizes: jax.Array) -> _Candidates:
    """Return the boxes of one image before any of them is dropped, in pixels of the padded image."""
    if isinstance(model, RetinaNet):
        logits, deltas = outputs.by_anchor()
        places = model.anchors.boxes(outputs.sizes, deltas[0].dtype)
        boxes = [CODER.decode(place, delta[0]) for place, delta in zip(places, deltas, strict=True)]
        levels = jnp.concatenate([jnp.full(len(own), level) for level, own in enumerate(boxes)])
        scores = jnp.concatenate([jax.nn.sigmoid(one[0]) for one in logits])
        return _Candidates(clip(jnp.concatenate(boxes), sizes[0])[:, None], levels, scores)
    assert isinstance(model, RCNN)
    found = model.proposals(outputs, sizes, model.settings.tested)
    regions, _, deltas = model.rounds_of(outputs, found, sizes)[-1]
    boxes = clip(model.rounds[-1].coder.decode(regions[0][:, None], deltas[0]), sizes[0])
    return _Candidates(boxes, levels_of(regions[0], len(outputs.levels) - 1), None)  # the coarsest is for proposals


def _levels(found: Found, candidates: _Candidates) -> np.ndarray:
    """Return the level of each detection (D,): of the candidate that is nearest, by box and score."""
    levels = np.zeros(len(found.labels), int)
    for d, (box, score, label) in enumerate(zip(*found[:3], strict=True)):
        boxes = candidates.boxes[:, label if candidates.boxes.shape[1] > 1 else 0]
        apart = abs(boxes - box).max(1)
        if candidates.scores is not None:
            apart = apart + abs(candidates.scores[:, label] - score)
        levels[d] = candidates.levels[apart.argmin()]
    return levels


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis stages") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Mean absolute activation of every stage, and of a detector's pyramid, over images; and the level "
        "that each found box comes from.",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; of a classifier, a segmenter or a detector")
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help=f"{IMAGES_HELP}; of a run of scenes, two of its scenes where none is given",
    )
    parser.add_argument("--out", type=png, default=Path("stages.png"), metavar="PNG", help="(stages.png)")
    parser.add_argument("--score", type=float, default=SCORE, metavar="S", help=f"the least score of boxes ({SCORE})")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    if not 0 <= args.score <= 1:
        raise UserError(f"--score is {args.score}; it must be from 0 to 1")
    name, _, place = args.model.partition("=") if "=" in args.model else ("", "", args.model)
    with storage_errors(args.out.parent):
        args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.model not in VARIANTS and is_composed(place, name):
        task, model, _, weights = open_composed(place, name)
        taken = weights.taken
        look = dense_stage_maps(task, model)
        rows = [(title, look(image)) for title, image in _dense_images(args, task)]
    else:
        subject = open_subject(args.model)
        taken = subject.taken
        pictures, images = views(photographs(args.images)[:_IMAGES], subject.data)
        rows = [
            (picture.file.name, stage_maps(subject, image)) for picture, image in zip(pictures, images, strict=True)
        ]
    print(f"weights: {taken}")
    for title, row in rows:
        print(title)
        print("\n".join(_lines(row, args.score)))
    draw_stages(args.out, rows, args.model, args.score)
    print(f"{args.out} shows them")


def _dense_images(args: argparse.Namespace, task: Any) -> list[tuple[str, np.ndarray]]:
    """Return titles and pixels of the images to look at."""
    if not args.images and task.data.name == "digit_scenes":
        source = type(task).open_source(task.config, task.data.eval_split)
        return [(source[i]["id"], pixels_of(source[i], task.data)) for i in range(2)]
    found = []
    for picture in photographs(args.images)[:_IMAGES]:
        image = pixels(picture.file, task.data)
        try:
            task.check_size(size_of(image))
        except UserError as error:
            raise UserError(f"{named(picture.file)}: {error}") from error
        found.append((picture.file.name, image))
    return found


def _lines(row: StageMaps, least: float) -> list[str]:
    lines = []
    for name, own, (down, across) in zip(row.names, row.maps, row.strides, strict=True):
        y, x = np.unravel_index(own.argmax(), own.shape)
        size = f"{own.shape[0]} x {own.shape[1]}"
        at = f"{(x + 0.5) * across:.0f}, {(y + 0.5) * down:.0f}"
        lines.append(f"  {name:<8} {size:>11}  mean {own.mean():8.3g}  largest {own.max():8.3g} at {at}")
    if row.found is not None and row.levels is not None:
        sure = row.found.scores >= least
        counts = np.bincount(row.levels[sure], minlength=sum(name.startswith("level") for name in row.names))
        told = ", ".join(f"{count} of level {level}" for level, count in enumerate(counts, 1) if count)
        lines.append(f"  boxes with a score of {least:g} or more: {told or 'none'}")
    return lines


@draws_names
def draw_stages(path: Path, rows: Sequence[tuple[str, StageMaps]], title: str, least: float = SCORE) -> None:
    """Draw a row for each image: the image, with boxes in the colour of their level, and every map over it.

    Levels are in a second row, below the stages that they are made of.

    Args:
        path: the picture, a .png file.
        rows: a title and the maps of each image.
        title: over all of it.
        least: the least score of the boxes.
    """
    boxed = any(row.found is not None for _, row in rows)
    groups = ("stage", "level") if boxed else ("stage",)
    places = [[i for i, words in enumerate(rows[0][1].names) if words.startswith(group)] for group in groups]
    columns = 1 + max(len(own) for own in places)
    ratio = max(row.image.shape[0] / row.image.shape[1] for _, row in rows)
    lines = len(rows) * len(groups)
    figure = Figure(figsize=(2.1 * columns, (2.1 * ratio + 0.3) * lines + 0.9), dpi=100, layout="constrained")
    words = f"{short(title, 70)}: mean absolute activation\neach map from its least (dark) to its largest (bright)"
    figure.suptitle(words, x=0.01, ha="left", fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        blank(axes)
    for number, (name, row) in enumerate(rows):
        own = grid[number * len(groups) : (number + 1) * len(groups)]
        show(own[0, 0], row.image)
        own[0, 0].set_title(short(name, 26), loc="left", fontsize=9)
        if row.found is not None and row.levels is not None:
            _draw_boxes(own[0, 0], row.found, row.levels, least)
        for line, group, indices in zip(own, groups, places, strict=True):
            for level, (axes, i) in enumerate(zip(line[1:], indices, strict=False)):
                _draw_map(axes, row, row.maps[i], row.strides[i])
                size = f"{row.maps[i].shape[0]}x{row.maps[i].shape[1]}"
                colour = COLOURS[level % len(COLOURS)] if group == "level" else "black"
                axes.set_title(f"{row.names[i]}, {size}", loc="left", fontsize=9, color=colour)
    if boxed:
        count = len(places[1])
        handles = [
            Line2D([], [], color=COLOURS[level % len(COLOURS)], linewidth=2, label=f"box of level {level + 1}")
            for level in range(count)
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=count, frameon=False, fontsize=9)
    save(figure, path)


def _draw_map(axes: Axes, row: StageMaps, own: np.ndarray, strides: tuple[float, float]) -> None:
    """Draw a map over the image in grey; cells that reach beyond the image are cut off."""
    height, width = size_of(row.image)
    grey = row.image[..., :3].mean(-1)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    extent = (0, own.shape[1] * strides[1], own.shape[0] * strides[0], 0)
    flat = float(own.max() == own.min())  # neither dark nor bright then
    limits = {"vmin": own.min() - flat, "vmax": own.max() + flat}
    axes.imshow(own, cmap="inferno", alpha=0.72, extent=extent, interpolation="nearest", **limits)
    axes.set(xlim=(0, width), ylim=(height, 0))


def _draw_boxes(axes: Axes, found: Found, levels: np.ndarray, least: float) -> None:
    for (x0, y0, x1, y1), score, level in zip(found.boxes, found.scores, levels, strict=True):
        if score >= least:
            colour = COLOURS[int(level) % len(COLOURS)]
            place = {"xy": (x0 - 0.5, y0 - 0.5), "width": x1 - x0, "height": y1 - y0}
            axes.add_patch(Rectangle(**place, fill=False, edgecolor="white", linewidth=3))
            axes.add_patch(Rectangle(**place, fill=False, edgecolor=colour, linewidth=1.8))
