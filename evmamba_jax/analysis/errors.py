"""What goes wrong in detectors and segmenters: ``python -m evmamba_jax.analysis errors RUN [--data PLACE]``."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from evmamba_jax import cli
from evmamba_jax.analysis.subjects import open_subject, png
from evmamba_jax.analysis.tide import KINDS, SIZES, DetectionErrors, Mistake, detection_errors
from evmamba_jax.analysis.wrong_pixels import PixelErrors, pixel_errors
from evmamba_jax.answers import SCORE
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.mmseg import label_map_of, pixels_of
from evmamba_jax.dense import DensePredictor
from evmamba_jax.detection.evaluate import Found, Truth, corner_and_size
from evmamba_jax.errors import UserError
from evmamba_jax.reports.drawing import BLUE, COLOURS, GREY, ORANGE, bars, blank, draws_names, numbered, save, short
from evmamba_jax.reports.label_maps import colours
from evmamba_jax.segmentation.losses import IGNORED
from evmamba_jax.storage import local, storage_errors, written_whole
from evmamba_jax.weights.load import is_composed

_EXAMPLES, _KEPT = 5, 4  # pictured errors of a kind; label maps
_PAIRS = 15  # confused pairs of classes, in table and picture
_SMALLEST = 48  # pixels of a pictured part's side


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis errors") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Errors of a detector by kind and size, and the AP that each kind costs; or of a segmenter the "
        "classes that are confused, and wrong pixels near borders, inside, and by the size of regions.",
    )
    parser.add_argument(
        "model", metavar="RUN", help="a run of detection or segmentation, or NAME=PLACE, e.g. upernet:vmamba_t=FILE"
    )
    parser.add_argument(
        "--data",
        default="",
        metavar="PLACE",
        help="a folder that `evmamba data prepare` wrote, or digit_scenes (default: the run's)",
    )
    parser.add_argument("--split", default="", metavar="SPLIT", help="of the data (default: that the run evaluates on)")
    parser.add_argument("--out", type=png, default=Path("errors.png"), metavar="PNG", help="(errors.png)")
    parser.add_argument("--json", type=Path, metavar="JSON", help="also write all figures, and of boxes the errors")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    name, _, place = args.model.partition("=") if "=" in args.model else ("", "", args.model)
    if not is_composed(place, name):
        open_subject(args.model)  # says what is wrong with a place that holds no model
        raise UserError(
            f"{args.model} names the classes of whole images, and errors looks into detectors and segmenters: take "
            "compare, or the run's report.html"
        )
    for file in filter(None, (args.out, args.json)):
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
    predictor = DensePredictor(place, name)
    source = _source(predictor, args.data, args.split)
    print(f"weights: {predictor.taken}")
    print(f"data: {source.name}, {source.split}, {len(source):,} images")
    told = (_of_boxes if predictor.kind == "boxes" else _of_label_maps)(args, predictor, source)
    if args.json:
        about = {"model": predictor.name, "weights": predictor.taken, "data": source.name, "split": source.split}
        with written_whole(args.json) as beside:
            beside.write_text(json.dumps(about | told, indent=1), encoding="utf-8", errors="backslashreplace")
        print(f"{args.json}: all figures")
    print("\n".join([f"{args.out} shows them", *predictor.remarks()]))


def _source(predictor: DensePredictor, place: str, split: str) -> Any:
    config = predictor.task.config
    if place and place != "digit_scenes":
        folder = local(place)
        if not folder.is_dir():
            raise UserError(f"--data {place} is no folder: name one that `evmamba data prepare` wrote, or digit_scenes")
        config.data.name, config.data.data_dir = folder.name, str(folder.parent)
    elif place:
        config.data.name = place
    source = type(predictor.task).open_source(config, split or config.data.eval_split)
    if source.class_names != predictor.class_names:
        first = next(
            (f"{a!r} and {b!r}" for a, b in zip(source.class_names, predictor.class_names, strict=False) if a != b),
            "the first ones are the same",
        )
        raise UserError(
            f"{source.name} has {len(source.class_names)} classes and the model {len(predictor.class_names)}, which "
            f"are others ({first}): name data of the model's classes with --data"
        )
    return source


class _Judged(NamedTuple):
    """An image of the data, its record, and what the model finds in it."""

    index: int
    pixels: np.ndarray
    record: Any
    found: Any


def _answered(predictor: DensePredictor, source: Any) -> Iterator[_Judged]:
    """Yield all images that can be read, in order, and what is found in each; progress is shown on stderr."""
    left_out = []
    for index in tqdm(range(len(source)), desc="images", unit=" images", mininterval=1.0, leave=False, disable=None):
        record = source[index]
        try:
            pixels = pixels_of(record, predictor.task.data)
        except CorruptImageError:
            left_out.append(record["id"])
            continue
        yield _Judged(index, pixels, record, predictor(pixels))
    if len(left_out) == len(source):
        raise UserError(f"not one image of {source.name} can be read")
    if left_out:
        print(f"left out: {len(left_out):,} images cannot be read, {left_out[0]} for instance", file=sys.stderr)


# Detectors.


def _of_boxes(args: argparse.Namespace, predictor: DensePredictor, source: Any) -> dict[str, Any]:
    """Tell, draw and return the errors of a detector."""
    indices, names, truths, found = [], [], [], []
    for one in _answered(predictor, source):
        indices.append(one.index)
        names.append(str(one.record["id"]))
        truths.append(Truth(*(one.record[field] for field in ("boxes", "labels", "crowd", "area"))))
        found.append(one.found)
    errors = detection_errors(truths, found)
    print("\n".join(_box_lines(errors)))

    def pixels(image: int) -> np.ndarray:
        return pixels_of(source[indices[image]], predictor.task.data)

    examples = {
        kind: [
            example_of(mistake, pixels(mistake.image), truths[mistake.image], found[mistake.image])
            for mistake in _worst(errors, kind, truths)
        ]
        for kind in KINDS
    }
    draw_detection_errors(args.out, errors, examples, predictor.class_names, f"{args.model} on {source.name}")
    return _box_figures(errors, names, truths, found, predictor.class_names)


def _box_lines(errors: DetectionErrors) -> list[str]:
    every, sure = errors.counts(), errors.counts(SCORE)
    lines = [
        f"AP at an overlap of 0.5: {errors.ap:.2f} %",
        f"{'error':<14}{'dAP':>7}{'count':>9}{f'score {SCORE}+':>12}" + "".join(f"{size:>9}" for size in SIZES),
    ]
    for kind in KINDS:
        counted = "" if kind == "missed" else f"{sure[kind].sum():,}"
        by_size = "".join(f"{count:>9,}" for count in every[kind])
        lines.append(f"{kind:<14}{errors.gains[kind]:>7.2f}{every[kind].sum():>9,}{counted:>12}{by_size}")
    for kind in ("false positives", "false negatives"):
        lines.append(f"{kind:<16}{errors.gains[kind]:>5.2f}")
    shares = [f"{n:,} of {m:,} {size}" for n, m, size in zip(errors.hit, errors.objects, SIZES, strict=True) if m]
    return [*lines, f"objects found: {', '.join(shares)}"]


def _box_figures(
    errors: DetectionErrors,
    names: Sequence[str],
    truths: Sequence[Truth],
    found: Sequence[Found],
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Return what the JSON file has: figures, and the errors that are missed objects or have a score to show."""
    every, sure = errors.counts(), errors.counts(SCORE)
    kinds = {
        kind: {"dAP": errors.gains[kind], "count": int(every[kind].sum()), f"score_{SCORE}": int(sure[kind].sum())}
        | dict(zip(SIZES, every[kind].tolist(), strict=True))
        for kind in KINDS
    }
    listed = []
    for one in errors.mistakes:
        if one.detection >= 0 and one.score < SCORE:
            continue
        row: dict[str, Any] = {"image": names[one.image], "kind": one.kind, "size": SIZES[one.size]}
        if one.detection >= 0:
            boxes = found[one.image]
            row["found"] = {"class": class_names[boxes.labels[one.detection]], "score": round(one.score, 6)}
            row["found"]["bbox"] = [round(side, 2) for side in corner_and_size(boxes.boxes[one.detection])]
        if one.object >= 0:
            truth = truths[one.image]
            row["object"] = {"class": class_names[truth.labels[one.object]]}
            row["object"]["bbox"] = [round(side, 2) for side in corner_and_size(truth.boxes[one.object])]
        listed.append(row)
    return {
        "images": len(names),
        "AP50": errors.ap,
        "kinds": kinds,
        "dAP_false_positives": errors.gains["false positives"],
        "dAP_false_negatives": errors.gains["false negatives"],
        "objects": dict(zip(SIZES, errors.objects.tolist(), strict=True)),
        "objects_found": dict(zip(SIZES, errors.hit.tolist(), strict=True)),
        "errors": listed,
    }


def _worst(errors: DetectionErrors, kind: str, truths: Sequence[Truth]) -> list[Mistake]:
    """Return the errors of a kind to draw: the surest, of missed objects the largest; of an image one."""
    own = [one for one in errors.mistakes if one.kind == kind]
    if kind == "missed":
        own.sort(key=lambda one: -truths[one.image].area[one.object])
    else:
        own.sort(key=lambda one: -one.score)
    firsts: dict[int, Mistake] = {}
    for one in own:
        firsts.setdefault(one.image, one)
    return list(firsts.values())[:_EXAMPLES]


class Example(NamedTuple):
    """A part of an image with one error.

    Attributes:
        image: uint8 (h, w, 3), the part.
        found: x0 y0 x1 y1 of the detection in the part's pixels; None of a missed object.
        label: class of the detection; -1 of a missed object.
        score: of the detection.
        truth: box of the object that it is about; None where there is none.
        true_label: class of that object; -1 where there is none.
    """

    image: np.ndarray
    found: np.ndarray | None
    label: int
    score: float
    truth: np.ndarray | None
    true_label: int


def example_of(mistake: Mistake, pixels: np.ndarray, truth: Truth, found: Found) -> Example:
    """Cut the square around an error's boxes out of its image.

    Args:
        mistake: the error.
        pixels: uint8 (H, W, 3).
        truth: of the image.
        found: in the image.
    """
    own = None if mistake.detection < 0 else np.asarray(found.boxes[mistake.detection], float)
    about = None if mistake.object < 0 else np.asarray(truth.boxes[mistake.object], float)
    boxes = np.stack([box for box in (own, about) if box is not None])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    side = int(max(1.5 * (high - low).max(), _SMALLEST))
    (height, width), (x, y) = pixels.shape[:2], (low + high) / 2
    left, top = (
        int(np.clip(round(at - side / 2), 0, max(length - side, 0))) for at, length in ((x, width), (y, height))
    )
    shift = np.array([left, top, left, top], float)
    return Example(
        image=pixels[top : top + side, left : left + side],
        found=None if own is None else own - shift,
        label=-1 if own is None else int(found.labels[mistake.detection]),
        score=mistake.score,
        truth=None if about is None else about - shift,
        true_label=-1 if about is None else int(truth.labels[mistake.object]),
    )


@draws_names
def draw_detection_errors(
    path: Path,
    errors: DetectionErrors,
    examples: dict[str, list[Example]],
    class_names: Sequence[str],
    title: str,
) -> None:
    """Draw a row for each kind of error: its AP, its counts by size, and examples.

    Args:
        path: the picture, a .png file.
        errors: of a detector.
        examples: by kind.
        class_names: one a class.
        title: over all of it.
    """
    every, sure = errors.counts(), errors.counts(SCORE)
    figure = Figure(figsize=(14, 2.05 * len(KINDS) + 0.9), dpi=90, layout="constrained")
    words = (
        f"{short(title, 90)}: AP50 {errors.ap:.1f} %\nframes: what was found, and dashed the object that it is about"
    )
    figure.suptitle(words, fontsize=12, x=0.01, ha="left")
    grid = figure.subplots(len(KINDS), 2 + _EXAMPLES, squeeze=False, width_ratios=[1.5, 1.0, *[1.0] * _EXAMPLES])
    grid[0, 0].set_title("dAP: points that the errors cost", fontsize=9, loc="left", pad=14)
    grid[0, 1].set_title("errors by size of the object", fontsize=9, loc="left", pad=14)
    longest = max(max(errors.gains[kind] for kind in KINDS), 1e-9)
    most = max(counts.max() for counts in every.values()) or 1
    for line, (kind, meaning) in zip(grid, KINDS.items(), strict=True):
        for axes in line:
            blank(axes)
        _draw_gain(line[0], kind, meaning, errors.gains[kind] / longest, errors.gains[kind])
        _draw_sizes(line[1], every[kind], most, None if kind == "missed" else int(sure[kind].sum()))
        for axes, example in zip(line[2:], examples[kind], strict=False):
            _draw_example(axes, example, class_names)
    save(figure, path)


def _draw_gain(axes: Axes, kind: str, meaning: str, share: float, gain: float) -> None:
    axes.set(xlim=(0, 1.35), ylim=(0, 1))
    axes.text(0, 0.9, kind, fontsize=12, weight="bold", va="top")
    axes.text(0, 0.72, "\n".join(_wrapped(meaning, 30)), fontsize=8.5, va="top", color=GREY)
    axes.barh(0.12, share, height=0.16, color=BLUE)
    axes.text(share, 0.12, f" dAP {gain:.2f}", fontsize=10, va="center")


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _draw_sizes(axes: Axes, counts: np.ndarray, most: int, sure: int | None) -> None:
    axes.set(xlim=(0, 1.6 * most), ylim=(4.2, -0.6))
    for row, (size, count) in enumerate(zip(SIZES, counts, strict=True)):
        axes.text(0, row - 0.02, size, fontsize=8.5, va="bottom", color=GREY)
        axes.barh(row + 0.22, count, height=0.38, color=COLOURS[2])
        axes.text(count, row + 0.22, f" {count:,}", fontsize=9, va="center")
    more = "" if sure is None else f"; with score {SCORE} or more {sure:,}"
    axes.text(0, 3.5, f"in all {counts.sum():,}{more}", fontsize=8.5, va="center")


def _draw_example(axes: Axes, example: Example, class_names: Sequence[str]) -> None:
    axes.imshow(example.image, interpolation="nearest")
    words = []
    for box, colour, style in ((example.truth, BLUE, "--"), (example.found, ORANGE, "-")):
        if box is not None:
            x0, y0, x1, y1 = box
            place = {"xy": (x0 - 0.5, y0 - 0.5), "width": x1 - x0, "height": y1 - y0}
            axes.add_patch(Rectangle(**place, fill=False, edgecolor="white", linewidth=3.4))
            axes.add_patch(Rectangle(**place, fill=False, edgecolor=colour, linewidth=1.8, linestyle=style))
    if example.found is not None:
        words.append((f"found {short(class_names[example.label], 12)} {example.score:.0%}", ORANGE))
    if example.truth is not None:
        words.append((f"object {short(class_names[example.true_label], 12)}", BLUE))
    for line, (text, colour) in enumerate(reversed(words)):
        place = {"xy": (0, 1), "xycoords": "axes fraction", "xytext": (0, 3 + 11 * line)}
        axes.annotate(text, **place, textcoords="offset points", fontsize=8.5, color=colour, va="bottom")


# Segmenters.


class Map(NamedTuple):
    """An image, its label map, and the one that was found: uint8 (H, W, 3), (H, W), (H, W)."""

    image: np.ndarray
    truth: np.ndarray
    found: np.ndarray


def _of_label_maps(args: argparse.Namespace, predictor: DensePredictor, source: Any) -> dict[str, Any]:
    """Tell, draw and return the errors of a segmenter."""
    total, worst = None, []
    classes = len(predictor.class_names)
    for one in _answered(predictor, source):
        truth = label_map_of(one.record["label_map"])
        errors = pixel_errors(truth, one.found, classes)
        total = errors if total is None else total + errors
        counted = errors.confusion.sum()
        worst.append((-1 + errors.confusion.trace() / max(counted, 1), one.index, Map(one.pixels, truth, one.found)))
        worst.sort(key=lambda entry: entry[:2])
        del worst[_KEPT:]
    assert total is not None
    print("\n".join(_pixel_lines(total, predictor.class_names)))
    draw_pixel_errors(
        args.out, total, [one for *_, one in worst], predictor.class_names, f"{args.model} on {source.name}"
    )
    return _pixel_figures(total, predictor.class_names, len(source))


def _name(k: int, names: Sequence[str]) -> str:
    """Return a class's name, with its number where another class has the same name."""
    return short(names[k], 20) if names.count(names[k]) == 1 else numbered(k, names, 18)


def _share(pair: np.ndarray) -> str:
    return f"{pair[1] / pair[0]:.2%} of {pair[0]:,} pixels wrong" if pair[0] else "no pixels"


def _rows(errors: PixelErrors) -> list[tuple[str, np.ndarray]]:
    """Return where pixels are: in words, and all and wrong ones."""
    near, inside = errors.border
    places = [(f"within {errors.distance:g} pixels of a border", near), ("further inside", inside)]
    return [*places, *((f"in {size} regions", pair) for size, pair in zip(SIZES, errors.regions, strict=True))]


def _pixel_lines(errors: PixelErrors, names: Sequence[str]) -> list[str]:
    total = errors.confusion.sum()
    wrong = total - errors.confusion.trace()
    lines = [f"{wrong / max(total, 1):.2%} of {total:,} pixels wrong"]
    lines += [f"  {place}: {_share(pair)}" for place, pair in _rows(errors)]
    if wrong:
        lines.append(f"  {errors.border[0, 1] / wrong:.1%} of the wrong pixels are near a border")
    lines.append(f"{'class':<22}{'taken for':<22}{'pixels':>12}{'of the class':>14}{'of all wrong':>14}")
    for one in errors.pairs()[:_PAIRS]:
        pair = f"{_name(one.label, names):<22}{_name(one.found, names):<22}"
        lines.append(f"{pair}{one.pixels:>12,}{one.share:>14.2%}{one.pixels / wrong:>14.2%}")
    more = len(errors.pairs()) - _PAIRS
    return [*lines, f"and {more:,} pairs more"] if more > 0 else lines


def _pixel_figures(errors: PixelErrors, names: Sequence[str], images: int) -> dict[str, Any]:
    keys = ("near_border", "inside", *(f"{size}_regions" for size in SIZES))
    places = {
        key: {"pixels": int(pair[0]), "wrong": int(pair[1])} for key, (_, pair) in zip(keys, _rows(errors), strict=True)
    }
    pairs = [
        {"class": names[one.label], "taken_for": names[one.found], "pixels": one.pixels, "share": one.share}
        for one in errors.pairs()
    ]
    total = int(errors.confusion.sum())
    figures = {"images": images, "pixels": total, "wrong": total - int(errors.confusion.trace())}
    return {**figures, "border_distance": errors.distance, **places, "confused": pairs}


@draws_names
def draw_pixel_errors(
    path: Path, errors: PixelErrors, maps: Sequence[Map], class_names: Sequence[str], title: str
) -> None:
    """Draw confused classes and where wrong pixels are, and below images with the most of them.

    Args:
        path: the picture, a .png file.
        errors: of a segmenter.
        maps: examples.
        class_names: one a class.
        title: over all of it.
    """
    total = errors.confusion.sum()
    wrong = total - errors.confusion.trace()
    pairs = errors.pairs()[:_PAIRS]
    top = max(3.2, 0.33 * len(pairs) + 0.8)
    heights = [top, 1.75 * -(-len(maps) // 2) + 0.4]
    figure = Figure(figsize=(12.5, sum(heights) + 0.5), dpi=100, layout="constrained")
    figure.suptitle(f"{short(title, 100)}: {wrong / max(total, 1):.2%} of the pixels wrong", x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).ravel()
    confused, where = above.subplots(1, 2)
    confused.set_title("class → taken for, the most pixels first: share of the class's pixels", loc="left", fontsize=10)
    words = [f"{_name(one.label, class_names)} → {_name(one.found, class_names)}" for one in pairs]
    notes = [f"{one.pixels:,} pixels, {one.pixels / wrong:.0%} of all wrong ones" for one in pairs]
    bars(confused, [one.share for one in pairs], words, notes, ORANGE)
    where.set_title("share of the pixels that is wrong", loc="left", fontsize=10)
    places = _rows(errors)
    shares = [pair[1] / max(pair[0], 1) for _, pair in places]
    bars(where, shares, [place for place, _ in places], [f"of {pair[0]:,}" for _, pair in places], BLUE)
    palette = colours(len(class_names))
    grid = below.subplots(max(1, -(-len(maps) // 2)), 8, squeeze=False)
    for axes in grid.flat:
        blank(axes)
    for number, one in enumerate(maps):
        row, side = divmod(number, 2)
        mistaken = (one.truth != one.found) & (one.truth != IGNORED)
        shown = one.image, palette[one.truth], palette[one.found], _over(one.image, mistaken)
        for axes, pixels, name in zip(grid[row, 4 * side :], shown, ("image", "truth", "found", "wrong"), strict=False):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_title(name if row == 0 else "", fontsize=9)
    save(figure, path)


def _over(image: np.ndarray, mistaken: np.ndarray) -> np.ndarray:
    """Return an image in grey, with the pixels (H, W) that are mistaken in orange."""
    grey = np.repeat(image.mean(-1, keepdims=True), 3, -1)
    pale = 0.5 * grey + 0.5 * 255
    return np.where(mistaken[..., None], (200, 80, 30), pale).astype(np.uint8)
