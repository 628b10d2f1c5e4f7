"""Two models on the same images: ``python -m evmamba_jax.analysis compare A B [--data PLACE]``."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evmamba_jax import cli
from evmamba_jax.analysis.labelled import DATA_HELP, labels_among, of_place, of_run, told, view_of
from evmamba_jax.analysis.subjects import MODEL_HELP, Subject, open_subject, png
from evmamba_jax.errors import UserError
from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE, blank, draws_names, numbered, save, short, show
from evmamba_jax.storage import storage_errors, written_whole

_SHOWN = 8  # images in the picture that one model alone gets right, of each model
_CLASSES = 20  # in picture and table


class Comparison(NamedTuple):
    """How two models do on the same N images of K classes.

    Attributes:
        agreement: share of the images that both take for the same class, 0 to 1.
        accuracies: share of the images that each gets right.
        counts: int (2, 2): images that the first gets right and wrong (rows), the second right and wrong (columns).
        only_first: int (n,), places of the images that the first alone gets right.
        only_second: the same of the second.
        images: int (K,), of each class.
        by_class: float64 (K, 2), share of a class's images that each gets right; NaN of a class without images.
        p_value: of McNemar's exact test: how likely two equally good models differ so much or more in ``only_first``
            and ``only_second``.
    """

    agreement: float
    accuracies: tuple[float, float]
    counts: np.ndarray
    only_first: np.ndarray
    only_second: np.ndarray
    images: np.ndarray
    by_class: np.ndarray
    p_value: float


def compare_models(labels: np.ndarray, first: np.ndarray, second: np.ndarray, classes: int) -> Comparison:
    """Compare the answers of two models for the same images.

    Args:
        labels: int (N,), the true classes, from 0 to ``classes`` - 1.
        first: int (N,), the classes that the first model finds.
        second: the same of the second.
        classes: K.

    Raises:
        UserError: no images, or arrays of different lengths.

    Source: McNemar (Psychometrika 12, 1947); its exact form is the two-sided binomial test of the images that one model
    alone gets right.
    """
    from scipy.stats import binomtest  # late: it takes a second

    if not len(labels) or not len(labels) == len(first) == len(second):
        raise UserError(f"there are {len(labels)} labels, {len(first)} and {len(second)} answers: give one an image")
    right = np.stack([first == labels, second == labels], 1)
    only_first, only_second = (np.flatnonzero(right[:, i] & ~right[:, 1 - i]) for i in (0, 1))
    both, neither = int(right.all(1).sum()), int((~right.any(1)).sum())
    images = np.bincount(labels, minlength=classes)
    hits = np.stack([np.bincount(labels[own], minlength=classes) for own in right.T], 1)
    with np.errstate(invalid="ignore"):
        by_class = hits / images[:, None]
    differing = len(only_first) + len(only_second)
    return Comparison(
        agreement=float((first == second).mean()),
        accuracies=(float(right[:, 0].mean()), float(right[:, 1].mean())),
        counts=np.array([[both, len(only_first)], [len(only_second), neither]]),
        only_first=only_first,
        only_second=only_second,
        images=images,
        by_class=by_class,
        p_value=float(binomtest(len(only_first), differing).pvalue) if differing else 1.0,
    )


class Answers(NamedTuple):
    """What a model says of the images of a source that it can read.

    Attributes:
        index: int (N,), their places in the source.
        names: str (N,).
        labels: int (N,), by the source's numbers.
        found: int (N,), the class that is most probable.
        probability: float32 (N,), of that class.
    """

    index: np.ndarray
    names: np.ndarray
    labels: np.ndarray
    found: np.ndarray
    probability: np.ndarray

    def at(self, index: np.ndarray) -> "Answers":
        """Return the answers for these places in the source, all of which it has."""
        rows = np.searchsorted(self.index, index)
        return Answers(*(column[rows] for column in self))


def answers(subject: Subject, source: Any) -> Answers:
    """Return what a classifier says of all images of a source that can be read.

    Raises:
        UserError: a model without a head; not one image can be read.
    """
    if subject.model.head is None:
        raise UserError(f"{subject.label} has no head, which would tell classes")
    rows = []
    for batch in told(subject, source):
        assert batch.scores is not None
        rows.append((batch.index, batch.names, batch.labels, batch.scores.argmax(1), batch.scores.max(1)))
    return Answers(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis compare") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog, description="Where two models of the same classes agree, and what only one of them gets right."
    )
    parser.add_argument("first", metavar="A", help=MODEL_HELP)
    parser.add_argument("second", metavar="B", help="another one, as A")
    parser.add_argument(
        "--data", metavar="PLACE", help=f"{DATA_HELP} (default: the images that A's own run evaluates on)"
    )
    parser.add_argument("--out", type=png, default=Path("compare.png"), metavar="PNG", help="(compare.png)")
    parser.add_argument("--csv", type=Path, metavar="CSV", help="write the images that only one model gets right")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    subjects = [open_subject(args.first), open_subject(args.second)]
    names = subjects[0].class_names
    for subject in subjects:
        if subject.model.head is None:
            raise UserError(f"{subject.label} has no head, which would tell classes")
        if subject.class_names != names:
            raise UserError(
                f"{args.first} and {args.second} tell other classes apart ({_some(names)} and "
                f"{_some(subject.class_names)}): compare models of the same classes"
            )
    source = _source(args)
    numbers = labels_among(source, names)
    for file in filter(None, (args.out, args.csv)):
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
    both = [answers(subject, source) for subject in subjects]
    index = np.intersect1d(both[0].index, both[1].index)
    first, second = (one.at(index) for one in both)
    labels = numbers[first.labels]
    found = compare_models(labels, first.found, second.found, len(names))
    for letter, subject in zip("AB", subjects, strict=True):
        print(f"{letter}: {subject.taken}")
    print("\n".join(_lines(found, f"{source.name}, {source.split}", names)))
    if args.csv:
        _write(args.csv, found, labels, first, second, names)
        count = len(found.only_first) + len(found.only_second)
        print(f"{args.csv}: the {count:,} images that only one of them gets right")
    shown = [
        [
            Example(view_of(source, int(index[i]), subjects[0].data), int(labels[i]), *_said(first, second, i))
            for i in _surest(only, first, second)
        ]
        for only in (found.only_first, found.only_second)
    ]
    draw_comparison(args.out, found, [subject.label for subject in subjects], shown, names)
    print(f"{args.out} shows them")


def _some(names: Sequence[str]) -> str:
    return f"{len(names)}: {', '.join(short(name) for name in names[:3])}{', ...' if len(names) > 3 else ''}"


def _source(args: argparse.Namespace) -> Any:
    if args.data is None:
        return of_run(args.first)["evaluation"]
    splits = of_place(args.data, held_out=0.0)  # nothing is trained: all pictures count
    return next(splits[name] for name in ("validation", "test", "train") if name in splits)


def _lines(found: Comparison, data: str, names: Sequence[str]) -> list[str]:
    (both, only_a), (only_b, neither) = found.counts.tolist()
    total = found.counts.sum()
    lines = [
        f"{data}: {total:,} images",
        f"A right {found.accuracies[0]:.2%}, B right {found.accuracies[1]:.2%}; the same answer {found.agreement:.2%}",
        f"both right {both:,}, only A {only_a:,}, only B {only_b:,}, both wrong {neither:,}",
        f"McNemar's exact test: p = {found.p_value:.3g}{_meaning(found)}",
        f"{'class':<24}{'images':>8}{'A right':>9}{'B right':>9}",
    ]
    order = _by_difference(found)
    for k in order:
        a, b = found.by_class[k]
        lines.append(f"{numbered(k, names, 18):<24}{found.images[k]:>8,}{a:>9.1%}{b:>9.1%}")
    more = np.count_nonzero(found.images) - len(order)
    return [*lines, f"and {more} classes in which they differ less"] if more else lines


def _meaning(found: Comparison) -> str:
    if found.p_value < 0.05:
        better = "A" if found.accuracies[0] > found.accuracies[1] else "B"
        return f": that {better} is better is more than chance, at the 5 % level"
    return ": the difference may be chance"


def _by_difference(found: Comparison) -> np.ndarray:
    """Return the classes to show: all where they are few, else those in which the models differ most."""
    there = np.flatnonzero(found.images)
    if len(there) <= _CLASSES:
        return there
    difference = abs(found.by_class[there, 0] - found.by_class[there, 1])
    return there[np.lexsort((there, -found.images[there], -difference))][:_CLASSES]


def _write(
    path: Path, found: Comparison, labels: np.ndarray, first: Answers, second: Answers, names: Sequence[str]
) -> None:
    """Write a line for each image that only one model gets right."""
    with (
        written_whole(path) as beside,
        beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file)
        table.writerow(
            ["image", "right", "class", "name", "a", "a_name", "a_probability", "b", "b_name", "b_probability"]
        )
        for letter, only in (("A", found.only_first), ("B", found.only_second)):
            for i in only.tolist():
                row = [str(first.names[i]), letter, labels[i], names[labels[i]]]
                for one in (first, second):
                    row += [one.found[i], names[one.found[i]], f"{one.probability[i]:.6f}"]
                table.writerow(row)


def _surest(only: np.ndarray, first: Answers, second: Answers) -> list[int]:
    """Return of some images those of which both models are surest, though they disagree."""
    both = first.probability[only] + second.probability[only]
    return only[np.argsort(-both, kind="stable")][:_SHOWN].tolist()


def _said(first: Answers, second: Answers, i: int) -> tuple[tuple[int, int], tuple[float, float]]:
    return (int(first.found[i]), int(second.found[i])), (float(first.probability[i]), float(second.probability[i]))


class Example(NamedTuple):
    """An image that one model alone gets right.

    Attributes:
        image: uint8 (H, W, C).
        label: its class.
        found: the classes that both find.
        probability: of these.
    """

    image: np.ndarray
    label: int
    found: tuple[int, int]
    probability: tuple[float, float]


@draws_names
def draw_comparison(
    path: Path,
    found: Comparison,
    labels: Sequence[str],
    examples: Sequence[Sequence[Example]],
    class_names: Sequence[str],
) -> None:
    """Draw counts and accuracies by class, and below images that only one of two models gets right.

    Args:
        path: the picture, a .png file.
        found: the comparison.
        labels: what the models are called.
        examples: images that the first alone gets right, and images that the second alone does.
        class_names: one a class.
    """
    order = _by_difference(found)
    top = max(2.6, 0.21 * len(order) + 1.0)
    rows = [row for row in examples if row]
    figure = Figure(figsize=(12.5, top + 1.95 * len(rows) + 0.7), dpi=100, layout="constrained")
    title = "\n".join(f"{letter}: {short(label, 110)}" for letter, label in zip("AB", labels, strict=True))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    above, *below = figure.subfigures(1 + len(rows), 1, height_ratios=[top, *[1.95] * len(rows)], squeeze=False).ravel()
    counts, classes = above.subplots(1, 2, width_ratios=[0.75, 1])
    _draw_counts(counts, found)
    _draw_classes(classes, found, order, class_names)
    for part, row in zip(below, rows, strict=True):
        own = row[0].found.index(row[0].label)
        total = int(found.counts[own, 1 - own])
        first = f", the {len(row)} of which both are surest" if total > len(row) else ""
        part.suptitle(f"only {'AB'[own]} is right: {total:,} images{first}", fontsize=10, x=0.01, ha="left")
        for axes, example in zip(part.subplots(1, _SHOWN, squeeze=False)[0], [*row, *[None] * _SHOWN], strict=False):
            blank(axes)
            if example is not None:
                _draw_example(axes, example, class_names)
    save(figure, path)


def _draw_counts(axes: Axes, found: Comparison) -> None:
    total = found.counts.sum()
    shades = np.array([["#dcebf5", "#f8e3d9"], ["#f8e3d9", "#e6e6e6"]])
    for row, column in np.ndindex(2, 2):
        axes.fill_between((column, column + 1), row, row + 1, color=shades[row, column], edgecolor="white", linewidth=3)
        count = found.counts[row, column]
        axes.text(column + 0.5, row + 0.42, f"{count:,}", ha="center", va="center", fontsize=17)
        axes.text(column + 0.5, row + 0.72, f"{count / total:.1%}", ha="center", va="center", fontsize=9, color=GREY)
    axes.set(xlim=(0, 2), ylim=(2, 0), aspect="auto")
    axes.set_xticks((0.5, 1.5), ("B right", "B wrong"))
    axes.set_yticks((0.5, 1.5), ("A right", "A wrong"), rotation=90, va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(
        f"{total:,} images; the same answer for {found.agreement:.1%}\n"
        f"A right {found.accuracies[0]:.2%}, B right {found.accuracies[1]:.2%}; exact McNemar p = {found.p_value:.3g}",
        fontsize=10,
        labelpad=8,
    )


def _draw_classes(axes: Axes, found: Comparison, order: np.ndarray, class_names: Sequence[str]) -> None:
    places = np.arange(len(order))
    shares = 100 * found.by_class[order]
    axes.hlines(places, shares.min(1), shares.max(1), color="#b9bec6", linewidth=2, zorder=1)
    # The ring lies around the dot where both are the same.
    axes.scatter(shares[:, 0], places, s=26, color=BLUE, zorder=3, label="A")
    axes.scatter(shares[:, 1], places, s=70, facecolor="none", edgecolor=ORANGE, linewidth=1.8, zorder=2, label="B")
    names = [f"{numbered(k, class_names, 18)} ({found.images[k]:,})" for k in order]
    axes.set_yticks(places, names, fontsize=9)
    axes.set_ylim(len(order) - 0.4, -0.6)
    low = shares.min()
    axes.set_xlim(low - 0.06 * max(100 - low, 1), 100 + 0.06 * max(100 - low, 1))
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    few = len(order) == np.count_nonzero(found.images)
    axes.set_title("" if few else f"the {len(order)} classes that differ most", loc="left", fontsize=10)
    axes.set_xlabel("right (%), by class; in brackets its images", fontsize=10)
    axes.legend(frameon=False, loc="lower left", fontsize=10, ncols=2, bbox_to_anchor=(0, 1.0), borderaxespad=0.2)


def _draw_example(axes: Axes, example: Example, class_names: Sequence[str]) -> None:
    show(axes, example.image)
    axes.set_title(f"truth: {short(class_names[example.label])}", fontsize=9, loc="left", pad=26)
    for line, (letter, found, share) in enumerate(zip("AB", example.found, example.probability, strict=True)):
        right = found == example.label
        words = f"{letter} {'✓' if right else '✗'} {short(class_names[found])} {share:.0%}"
        place = {
            "xy": (0, 1),
            "xycoords": "axes fraction",
            "xytext": (0, 14 - 11 * line),
            "textcoords": "offset points",
        }
        axes.annotate(words, **place, fontsize=9, color=BLUE if right else ORANGE, va="bottom")
