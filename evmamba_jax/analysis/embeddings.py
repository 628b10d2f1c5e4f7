"""What enters the head, of a folder of pictures: ``python -m evmamba_jax.analysis embeddings MODEL [FOLDER ...]``."""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from evmamba_jax import cli
from evmamba_jax.analysis import knn
from evmamba_jax.analysis.knn import TEMPERATURE, Neighbours, knn_classes, linear_probe, neighbours
from evmamba_jax.analysis.labelled import DATA_HELP, Loose, of_place, of_run, told, view_of
from evmamba_jax.analysis.subjects import MODEL_HELP, Subject, open_subject, png
from evmamba_jax.data.files import Folder
from evmamba_jax.data.listing import by_folders
from evmamba_jax.data.pictures import kind_of
from evmamba_jax.errors import UserError
from evmamba_jax.predict import is_image, pictures_in
from evmamba_jax.reports.drawing import BLUE, GREY, ORANGE, blank, draws_names, save, short, show
from evmamba_jax.storage import local, storage_errors, written_whole

_ASK = ("evaluation", "validation", "test")  # splits whose images may be queries, the first that is there
_ROWS, _NEAR = 6, 6  # queries in the picture, and neighbours of each


class Features(NamedTuple):
    """What enters the head, of N images.

    Attributes:
        embeddings: float32 (N, D).
        images: str (N,), their names.
        labels: int (N,), their classes; 0 where nobody knows them.
        splits: str (N,).
        index: int (N,), their places in the source of their split.
        class_names: one a label.
    """

    embeddings: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    index: np.ndarray
    class_names: tuple[str, ...]

    def of(self, split: str) -> "Features":
        """Return the features of one split."""
        own = self.splits == split
        return Features(*[column[own] for column in self[:5]], class_names=self.class_names)


def embeddings_of(subject: Subject, sources: Mapping[str, Any]) -> Features:
    """Return what enters the head of a model, of all images of some sources that can be read.

    Args:
        subject: the model.
        sources: by the names of their splits; all of the same classes.

    Raises:
        UserError: not one image of a source can be read.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for split, source in sources.items():
        for batch in told(subject, source):
            splits = np.full(len(batch.index), split)
            columns.append((batch.embeddings, batch.names, batch.labels, splits, batch.index))
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return Features(*joined, class_names=next(iter(sources.values())).class_names)


def main(argv: list[str] | None = None, prog: str = "python -m evmamba_jax.analysis embeddings") -> int:
    """Run the command with ``argv``; return the exit code, 2 for a user's mistake."""
    parser = cli.Parser(
        prog=prog,
        description="Features of pictures, what enters the head; and by them, where classes are known, accuracy of the "
        "nearest neighbours and of a linear probe.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "places",
        nargs="*",
        metavar="FOLDER",
        help=f"{DATA_HELP}; or pictures and folders of pictures, whose classes nobody knows (default: the data of the "
        "model's own run)",
    )
    parser.add_argument("--out", type=_table, metavar="FILE", help="write the features: .npz or .parquet")
    parser.add_argument("--picture", type=png, metavar="PNG", help="draw queries beside their nearest neighbours")
    parser.add_argument("--k", type=int, default=knn.K, metavar="N", help=f"neighbours that vote ({knn.K})")
    parser.add_argument("--image-size", type=int, metavar="N", help="side in pixels, where it is to be another")
    return cli.main(lambda: _run(parser.parse_args(argv)))


def _table(text: str) -> Path:
    if not text.endswith((".npz", ".parquet")):
        raise argparse.ArgumentTypeError(f"{text} must end in .npz or .parquet")
    if text.endswith(".parquet") and importlib.util.find_spec("pyarrow") is None:
        raise argparse.ArgumentTypeError(f"{text} is written with pyarrow: pip install pyarrow, or name a file .npz")
    return Path(text)


def _run(args: argparse.Namespace) -> None:
    if args.k < 1:
        raise UserError(f"--k is {args.k}; it must be 1 or more")
    subject = open_subject(args.model, image_size=args.image_size)
    sources = _sources(args)
    known = not isinstance(next(iter(sources.values())), Loose)
    if not known and not (args.out or args.picture):
        raise UserError("without classes there is no accuracy to tell: name --out or --picture, or folders of classes")
    for file in filter(None, (args.out, args.picture)):
        with storage_errors(file.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
    print(f"weights: {subject.taken}")
    found = embeddings_of(subject, sources)
    counts = ", ".join(f"{(found.splits == split).sum():,} in {split}" for split in sources)
    classes = f", {len(found.class_names):,} classes" if known else ""
    print(f"features: {found.embeddings.shape[1]:,} numbers an image; images: {counts}{classes}")
    asked = next((found.of(split) for split in _ASK if split in sources), found)
    bank = found.of("train") if known else found
    if known:
        _tell_accuracies(bank, asked, args.k)
    if args.out:
        _write(args.out, found, known)
        print(f"{args.out}: features of {len(found.images):,} images")
    if args.picture:
        rows, wrong = _rows(subject, sources, bank, asked, args.k, known)
        title = f"{subject.label}\nleft: queries; right: the images nearest to each, with the cosine of their features"
        if known:
            title += f"\n{wrong:,} of {len(asked.labels):,} queries are voted wrong; the first rows show some of these"
        draw_neighbours(args.picture, rows, title)
        print(f"{args.picture} shows queries and their nearest neighbours")


def _sources(args: argparse.Namespace) -> dict[str, Any]:
    """Return what to look at, by splits: with known classes ``train`` and another one, or loose pictures as ``all``."""
    if not args.places:
        return of_run(args.model)
    for place in args.places:
        if not local(place).exists():
            raise UserError(f"{place} does not exist: name {DATA_HELP}, or pictures")
    if len(args.places) > 1 or not _has_classes(args.places[0]):
        return {"all": Loose(list(pictures_in(args.places)))}
    place = args.places[0]
    sources = of_place(place, held_out=0.2)  # as training holds them out
    labels = np.concatenate([source.labels for source in sources.values()])
    if len(np.unique(labels)) < 2:
        raise UserError(
            f"all pictures of {place} are of one class: accuracies need two; for features alone, name the pictures"
        )
    if "train" not in sources or not any(split in sources for split in _ASK):
        raise UserError(
            f"{place} has pictures in {', '.join(sources)} alone: known ones in train/CLASS/ and others to ask with in "
            "val/CLASS/ are needed"
        )
    return sources


def _has_classes(place: str) -> bool:
    path = Path(place)
    if kind_of(place) != "folder" or not path.is_dir():
        return kind_of(place) != "folder" or path.suffix in (".zip", ".tar")
    names = Folder(path).find().names
    return any(is_image(path / names[int(row)]) for row in by_folders(names).rows)  # other files make no class


def _tell_accuracies(bank: Features, asked: Features, k: int) -> None:
    classes, k = len(bank.class_names), min(k, len(bank.labels))
    voted = knn_classes(neighbours(bank.embeddings, asked.embeddings, k), bank.labels, classes)
    right = (voted == asked.labels).sum()
    of = f"of {len(asked.labels):,} in {asked.splits[0]}, known {len(bank.labels):,} in train"
    print(f"{k} nearest neighbours: {right / len(asked.labels):.2%} right ({right:,} {of})")
    print(f"  by cosine similarity s, votes weighted exp(s / {TEMPERATURE})")
    probe = linear_probe(bank.embeddings, bank.labels, asked.embeddings, asked.labels)
    ended = "" if probe.converged else "; stopped after 1,000 iterations"
    print(f"linear probe: {probe.accuracy:.2%} right")
    print(f"  logistic regression on standardised features, C = {probe.strength:g} by a fifth of train{ended}")


def _write(path: Path, found: Features, known: bool) -> None:
    columns: dict[str, Any] = {"images": found.images, "splits": found.splits, "labels": found.labels}
    if not known:
        columns = {"images": found.images}
    names: dict[str, Any] = {"class_names": np.array(found.class_names)} if known else {}
    with written_whole(path) as beside:
        if path.suffix == ".npz":
            with beside.open("wb") as file:
                np.savez(file, embeddings=found.embeddings, **columns, **names)
            return
        import pyarrow
        import pyarrow.parquet

        flat = pyarrow.array(found.embeddings.ravel())
        table = {
            name: [text.encode("utf-8", "backslashreplace").decode() for text in column.tolist()]
            if column.dtype.kind == "U"
            else column
            for name, column in columns.items()
        }
        if known:
            table["classes"] = [found.class_names[label] for label in found.labels]
        table["embeddings"] = pyarrow.FixedSizeListArray.from_arrays(flat, found.embeddings.shape[1])
        pyarrow.parquet.write_table(pyarrow.table(table), beside)


class Row(NamedTuple):
    """One query of the picture, and its nearest neighbours.

    Attributes:
        query: uint8 (H, W, C).
        name: what it is.
        right: whether its neighbours' vote is right; None where nobody knows.
        near: of each neighbour the image, what it is, the similarity, and whether it is of the query's class.
    """

    query: np.ndarray
    name: str
    right: bool | None
    near: Sequence[tuple[np.ndarray, str, float, bool | None]]


def _rows(
    subject: Subject, sources: Mapping[str, Any], bank: Features, asked: Features, k: int, known: bool
) -> tuple[list[Row], int]:
    """Return the rows of the picture, and how many of all queries are voted wrong."""
    extra = 0 if known else 1  # a loose picture is its own nearest neighbour
    shown = min(_NEAR, len(bank.labels) - extra)
    if shown < 1:
        raise UserError("one picture has no neighbours: name two or more to draw them")
    k = min(k, len(bank.labels))
    near = neighbours(bank.embeddings, asked.embeddings, max(shown + extra, k))
    votes = knn_classes(Neighbours(near.index[:, :k], near.similarity[:, :k]), bank.labels, len(bank.class_names))

    def image(of: Features, place: int) -> np.ndarray:
        return view_of(sources[str(of.splits[place])], int(of.index[place]), subject.data)

    def name(of: Features, place: int) -> str:
        return of.class_names[of.labels[place]] if known else Path(str(of.images[place])).name

    rows = []
    for q in _telling(votes == asked.labels):
        right, label = bool(votes[q] == asked.labels[q]), asked.labels[q]
        pairs = zip(near.index[q].tolist(), near.similarity[q].tolist(), strict=True)
        beside = [
            (image(bank, j), name(bank, j), similarity, bool(bank.labels[j] == label) if known else None)
            for j, similarity in [pair for pair in pairs if known or pair[0] != q][:shown]
        ]
        title = name(asked, q) + ("" if right else f", voted {short(bank.class_names[votes[q]], 8)}")
        rows.append(Row(image(asked, q), title, right if known else None, beside))
    return rows, int((votes != asked.labels).sum())


def _telling(right: np.ndarray) -> list[int]:
    """Return the places of queries to draw: of the wrong ones up to half, then right ones evenly from all."""
    wrong = _spread(np.flatnonzero(~right), _ROWS // 2)
    return [*wrong, *_spread(np.flatnonzero(right), _ROWS - len(wrong))]


def _spread(places: np.ndarray, count: int) -> list[int]:
    if len(places) <= count:
        return places.tolist()
    return places[np.linspace(0, len(places) - 1, count).round().astype(int)].tolist()


@draws_names
def draw_neighbours(path: Path, rows: Sequence[Row], title: str) -> None:
    """Draw queries on the left, and the nearest neighbours of each on the right, the nearest first.

    Args:
        path: the picture, a .png file.
        rows: one a query.
        title: over all of it.
    """
    columns = 1 + max(len(row.near) for row in rows)
    figure = Figure(figsize=(1.5 * columns + 0.4, 1.68 * len(rows) + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    widths = [1.0, 0.18, *[1.0] * (columns - 1)]  # a gap behind the queries
    grid = figure.subplots(len(rows), columns + 1, squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        blank(axes)
    for row, line in zip(rows, grid, strict=True):
        show(line[0], row.query)
        line[0].set_title(f"{_sign(row.right)}{short(row.name, 18)}", fontsize=9, color=_colour(row.right), loc="left")
        _frame(line[0], _colour(row.right))
        for axes, (image, name, similarity, same) in zip(line[2:], row.near, strict=False):
            show(axes, image)
            words = f"{_sign(same)}{short(name, 11)} {similarity:.2f}"
            axes.set_title(words, fontsize=9, color=_colour(same), loc="left")
            _frame(axes, _colour(same))
    save(figure, path)


def _sign(right: bool | None) -> str:
    return "" if right is None else "✓ " if right else "✗ "


def _colour(right: bool | None) -> str:
    return GREY if right is None else BLUE if right else ORANGE


def _frame(axes: Axes, colour: str) -> None:
    frame = Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, edgecolor=colour, linewidth=2.5)
    frame.set_clip_on(False)
    axes.add_patch(frame)
