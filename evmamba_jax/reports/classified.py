"""What a report says of a classification: figures with their uncertainty, classes, calibration, telling pictures."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from evmamba_jax.reports import page
from evmamba_jax.reports.confusion import CONFUSION, confusion
from evmamba_jax.reports.drawing import BLUE, GREY, draws_names, save
from evmamba_jax.reports.page import Section

RESAMPLES = 1000
SHOWN = 24  # pictures of mistakes, and as many of right ones
_BINS = 10


class Answers(NamedTuple):
    """What an evaluation found, N images and K classes.

    Attributes:
        labels: int (N,), the true classes.
        scores: float32 (N, K), probabilities.
        wrong: index, pixels uint8 (H, W, C) of the surest mistakes.
        right: the same of the surest right ones.
    """

    labels: np.ndarray
    scores: np.ndarray
    wrong: Sequence[tuple[int, np.ndarray]]
    right: Sequence[tuple[int, np.ndarray]]


def counts(answers: Answers) -> np.ndarray:
    """Return the confusion matrix (K, K): true class, class it was taken for."""
    classes = answers.scores.shape[1]
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (answers.labels, answers.scores.argmax(1)), 1)
    return matrix


def figures(matrix: np.ndarray) -> dict[str, float]:
    """Return accuracy, balanced accuracy and macro F1 of a confusion matrix, or of a stack of them (..., K, K).

    The means are over the classes that have images.
    """
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    images, taken = matrix.sum(-1), matrix.sum(-2)
    present = images > 0
    recall = right / np.maximum(images, 1)
    f1 = 2 * right / np.maximum(images + taken, 1)
    mean = lambda values: (values * present).sum(-1) / present.sum(-1)  # noqa: E731
    return {
        "accuracy": right.sum(-1) / images.sum(-1),
        "balanced accuracy": mean(recall),
        "macro F1": mean(f1),
    }


def intervals(matrix: np.ndarray, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each of :func:`figures` by bootstrap over the images.

    Images drawn with replacement give counts of a multinomial distribution over the cells of the matrix, so that the
    counts are drawn at once.
    """
    cells = np.flatnonzero(matrix)
    total = matrix.sum()
    drawn = np.random.default_rng(seed).multinomial(total, matrix.ravel()[cells] / total, size=RESAMPLES)
    found: dict[str, list[float]] = {}
    for counts_of in drawn:
        again = np.zeros(matrix.size, np.int64)
        again[cells] = counts_of
        for name, value in figures(again.reshape(matrix.shape)).items():
            found.setdefault(name, []).append(float(value))
    return {name: tuple(np.percentile(values, (2.5, 97.5))) for name, values in found.items()}  # pyrefly: ignore


def calibration(answers: Answers) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return, of ten bins by the probability of the class found: images, mean probability, share right; and the ECE.

    Source: Guo et al., On Calibration of Modern Neural Networks (2017).
    """
    surest = answers.scores.max(1)
    right = answers.scores.argmax(1) == answers.labels
    bins = np.minimum((surest * _BINS).astype(int), _BINS - 1)
    images = np.bincount(bins, minlength=_BINS)
    mean = lambda values: np.bincount(bins, values, _BINS) / np.maximum(images, 1)  # noqa: E731
    sure, share = mean(surest), mean(right)
    return images, sure, share, float((images * abs(sure - share)).sum() / images.sum())


def sections(answers: Answers, class_names: Sequence[str], whose: str) -> list[Section]:
    """Return the sections of a report on a classification."""
    matrix = counts(answers)
    spread = intervals(matrix)
    rows = [
        (name, f"{value:.1%}", f"{spread[name][0]:.1%} to {spread[name][1]:.1%}")
        for name, value in figures(matrix).items()
    ]
    images = len(answers.labels)
    told = f"{images:,} images; intervals hold 95 % of {RESAMPLES:,} bootstrap samples of the images."
    if matrix.trace() == images:  # no sample has a mistake then; the rule of three says what that is worth
        told += f" All are right, which a model that errs on {min(1, 3 / images):.0%} of all such images may well show."
    with TemporaryDirectory() as folder:
        confusion(folder, matrix, class_names, whose)
        confused = page.picture(Path(folder) / CONFUSION, "which classes are taken for which")
        error = _draw_calibration(Path(folder) / "calibration.png", answers)
        calibrated = page.picture(Path(folder) / "calibration.png", "share of right answers by probability")
    return [
        Section("Figures", page.table(("", "value", "95 % interval"), rows) + page.text(told)),
        Section("Classes", page.table(*_by_class(matrix, answers, class_names))),
        Section("Which classes are taken for which", confused),
        Section(
            "Are the probabilities right?",
            calibrated
            + page.text(
                f"Of answers with a probability of 80 %, 80 % should be right: the dashed line. The mean distance from "
                f"it, the expected calibration error, is {error:.1%}."
            ),
        ),
        Section("Surest mistakes", _cards(answers, answers.wrong, class_names) or page.text("None.")),
        Section("Surest right answers", _cards(answers, answers.right, class_names) or page.text("None.")),
    ]


def _by_class(matrix: np.ndarray, answers: Answers, class_names: Sequence[str]):
    columns = ("class", "images", "precision", "recall", "F1", "AUC")
    share = lambda part, whole: f"{part / whole:.1%}" if whole else "none"  # noqa: E731
    rows = []
    for k, name in enumerate(class_names):
        right, images, taken = matrix[k, k], matrix[k].sum(), matrix[:, k].sum()
        one = answers.labels == k
        area = f"{_area(one, answers.scores[:, k]):.3f}" if 0 < one.sum() < len(one) else "none"
        of = share(right, taken), share(right, images), share(2 * right, images + taken)
        rows.append((name, f"{images:,}", *of, area))
    return columns, rows


def _area(positive: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve: the share of pairs of which the positive one scores higher, ties half."""
    _, place, number = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(number) - (number - 1) / 2)[place]
    positives = positive.sum()
    higher = ranks[positive].sum() - positives * (positives + 1) / 2
    return higher / (positives * (len(positive) - positives))


@draws_names
def _draw_calibration(path: Path, answers: Answers) -> float:
    """Draw the share of right answers by probability, and return the expected calibration error."""
    images, sure, share, error = calibration(answers)
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    filled = images > 0
    axes.plot((0, 1), (0, 1), linestyle="--", color=GREY)
    axes.bar((np.arange(_BINS) + 0.5)[filled] / _BINS, share[filled], width=0.09, color=BLUE, alpha=0.35)
    axes.plot(sure[filled], share[filled], marker="o", color=BLUE)
    for x, y, count in zip(sure[filled], share[filled], images[filled], strict=True):
        axes.annotate(f"{count:,}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    axes.set(xlim=(0, 1), ylim=(0, 1.12), xlabel="probability of the class found", ylabel="share that is right")
    axes.set_title("numbers of images at the points", fontsize=9, color=GREY)
    save(figure, path)
    return error


def _cards(answers: Answers, chosen: Sequence[tuple[int, np.ndarray]], class_names: Sequence[str]) -> str:
    captions = []
    for index, _ in chosen:
        found, label = int(answers.scores[index].argmax()), int(answers.labels[index])
        sure = f"{class_names[found]} {answers.scores[index, found]:.0%}"
        captions.append(f"✓ {sure}" if found == label else f"✗ {sure}; truth: {class_names[label]}")
    return page.cards([image for _, image in chosen], captions) if captions else ""
