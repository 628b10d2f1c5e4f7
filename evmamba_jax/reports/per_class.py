"""per_class.csv: what each class is taken for."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from evmamba_jax.storage import written_whole

PER_CLASS = "per_class.csv"


class Counts(NamedTuple):
    """Images of an evaluation, K classes; int32, NumPy's or JAX's."""

    confusion: Any  # (K, K): true class, class it was taken for
    top1: Any  # (K,): right at the first guess
    top5: Any  # (K,): right within five guesses


def write_per_class(folder: Path, counts: Mapping[str, Counts], class_names: Sequence[str]) -> None:
    """Write per_class.csv: one line a class, in label order.

    Its columns are ``class``, ``name``, ``images``; ``top1``, ``top5`` (per cent of these images), ``taken_for``,
    ``taken_for_name`` and ``taken_for_share``, the wrong class that most of them were taken for and per cent that were;
    and the last five with ``ema_`` where there is a moving average. A field that nothing stands for is empty: the
    accuracy of a class without images, what a class is taken for that is never mistaken.

    Args:
        folder: for the file.
        counts: of each variant, NumPy arrays.
        class_names: one a class.

    Raises:
        UserError: the folder is full or not writable.
    """
    rows = [{"class": k, "name": name, "images": 0} for k, name in enumerate(class_names)]
    for variant, found in counts.items():
        prefix = "" if variant == "model" else f"{variant}_"
        for row, images, figures in zip(rows, found.confusion.sum(1), _figures(found, class_names), strict=True):
            row["images"] = int(images)  # the same for every variant
            row |= {prefix + name: value for name, value in figures.items()}
    with written_whole(folder / PER_CLASS) as beside, _open(beside) as file:
        writer = csv.DictWriter(file, rows[0])  # of any other line ends it leaves a bare "\r" in a name unquoted
        writer.writeheader()
        writer.writerows(rows)


def write_columns(folder: Path, class_names: Sequence[str], columns: Mapping[str, Sequence[object]]) -> None:
    """Write per_class.csv for any task: ``class``, ``name``, then these columns, a value a class.

    Args:
        folder: for the file.
        class_names: one a class.
        columns: by their names.

    Raises:
        UserError: the folder is full or not writable.
    """
    with written_whole(folder / PER_CLASS) as beside, _open(beside) as file:
        table = csv.writer(file)
        table.writerow(["class", "name", *columns])
        table.writerows(zip(range(len(class_names)), class_names, *columns.values(), strict=True))


def per_cent(values: Sequence[float] | np.ndarray) -> list[str]:
    """Return figures as a column has them; empty where there is none."""
    return ["" if np.isnan(value) else f"{value:.2f}" for value in values]


def _open(path: Path) -> TextIO:
    # File names that are no UTF-8 give names with lone surrogates, which are written as escapes.
    return path.open("w", encoding="utf-8", errors="backslashreplace", newline="")


def _figures(counts: Counts, class_names: Sequence[str]) -> Iterator[dict[str, int | str]]:
    """Yield what per_class.csv says of each class for one variant."""
    for k, taken_for in enumerate(counts.confusion):
        images = taken_for.sum()
        share = lambda count, of=images: f"{100 * count / of:.2f}" if of else ""  # noqa: E731
        mistakes = np.where(np.arange(len(taken_for)) == k, 0, taken_for)
        most = int(mistakes.argmax())
        mistaken = mistakes[most] > 0
        yield {
            "top1": share(counts.top1[k]),
            "top5": share(counts.top5[k]),
            "taken_for": most if mistaken else "",
            "taken_for_name": class_names[most] if mistaken else "",
            "taken_for_share": share(mistakes[most]) if mistaken else "",
        }
