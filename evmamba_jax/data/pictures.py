"""Data sets as people have them: a folder, an archive or a table of pictures, listed whole before training."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.files import Files, Found, Listed, Strings, open_files
from evmamba_jax.data.imagenet import in_words
from evmamba_jax.data.index import IMAGE, OTHER, UNREADABLE, Index, open_index
from evmamba_jax.data.listing import (
    SPLITS,
    TABLES,
    Listing,
    by_folders,
    by_table,
    counted,
    read_table,
    relative,
)
from evmamba_jax.errors import UserError, nearest
from evmamba_jax.storage import local

FEW = 10  # pictures of a class to train on, below which a line says so


@dataclasses.dataclass(frozen=True)
class PictureSource:
    """One split of pictures in files; ``source[i]`` gives an undecoded record.

    Attributes:
        name: of the place.
        split: its name.
        class_names: in label order.
        files: where the bytes lie.
        found: all files of the place.
        rows: int64 (N,), the files of this split among them, in its order.
        labels: int32 (N,), the classes; or indices into ``label_sets``.
        label_sets: the classes of pictures that may have several, or none; None where each has one.
        fingerprint: a hash of contents, order and labels.
        findings: what is worth saying before training, a line each.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    files: Files
    found: Found
    rows: np.ndarray
    labels: np.ndarray
    label_sets: tuple[tuple[int, ...], ...] | None
    fingerprint: str
    findings: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one record: ``image``, the bytes of the file; ``label``, or several ``labels``; ``id``, its name.

        Raises:
            CorruptImageError: the file cannot be read, or is not what it was.
        """
        row = int(self.rows[index])
        name = self.found.names[row]
        try:
            data = self.files.read(name, self.found.where[row])
        except Exception as error:  # zlib and struct have their own kinds, for damaged archives
            raise CorruptImageError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if self.found.sizes[row] not in (-1, len(data)):
            raise CorruptImageError(f"{name} has changed since it was listed: start again")
        label = int(self.labels[index])
        known = {"label": label} if self.label_sets is None else {"labels": self.label_sets[label]}
        return {"image": data, **known, "id": name}


class Pictures(NamedTuple):
    """A whole data set.

    Attributes:
        place: a folder, an archive or a table.
        class_names: in label order.
        splits: rows of ``index`` and labels, by the names of the splits that there are.
        label_sets: as a :class:`PictureSource` has them.
        index: of all files.
        files: where they lie.
        findings: what is worth saying, a line each.
    """

    place: Path
    class_names: tuple[str, ...]
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    label_sets: tuple[tuple[int, ...], ...] | None
    index: Index
    files: Files
    findings: tuple[str, ...]


def open_split(config: DataConfig, split: str, work: Path | None = None, *, several: bool = False) -> PictureSource:
    """Open one split of the configured pictures.

    Args:
        config: reads name (a key of :data:`PLACES`), data_dir, classes, held_out and on_corrupt.
        split: ``train``, ``validation`` or ``test``; without pictures to validate, ``validation`` is ``test``.
        work: a folder for the index, where it cannot be kept beside the pictures.
        several: whether a picture may have several labels, or none.

    Raises:
        UserError: nothing is there, the split is missing or empty, a label is outside the list, or, unless
            ``on_corrupt`` is "skip", a file cannot be read.
    """
    pictures = open_pictures(config, work, several=several)
    if split == "validation" and split not in pictures.splits and "test" in pictures.splits:
        split = "test"
    if split not in pictures.splits:
        raise UserError(
            f"{pictures.place} has no split {split!r}{nearest(split, pictures.splits)}; there are "
            f"{sorted(pictures.splits)}"
        )
    rows, labels = pictures.splits[split]
    digests = pictures.index.digests[rows]
    contents = hashlib.sha256(digests.tobytes() + labels.tobytes())
    if pictures.label_sets is not None:
        contents.update(repr(pictures.label_sets).encode())
    return PictureSource(
        name=str(pictures.place),
        split=split,
        class_names=pictures.class_names,
        files=pictures.files,
        found=pictures.index.found,
        rows=rows,
        labels=labels,
        label_sets=pictures.label_sets,
        fingerprint=contents.hexdigest()[:32],
        findings=pictures.findings,
    )


def open_pictures(config: DataConfig, work: Path | None = None, *, several: bool | None = False) -> Pictures:
    """List the configured pictures.

    Arguments and errors are as for :func:`open_split`; ``several=None`` takes the labels as they are.
    """
    if not config.data_dir:
        raise UserError(f"data.name={config.name!r} needs data.data_dir, the place of the pictures")
    place = local(config.data_dir)
    files, index, listing, known = PLACES[config.name](place, work)
    kinds = index.kinds[listing.rows]
    names = index.found.names

    def named(mask: np.ndarray) -> list[str]:
        return [names[int(i)] for i in listing.rows[mask]]

    findings = list(listing.asides)
    unreadable, strangers = named(kinds == UNREADABLE), named(kinds == OTHER)
    if config.on_corrupt == "error" and (unreadable or listing.missing):
        lost = [*unreadable, *listing.missing]
        raise UserError(
            f"{counted(lost, 'file cannot be read', 'files cannot be read')}; mend {place}, or leave such files out "
            "with data.on_corrupt=skip"
        )
    for group, one, many in (
        (unreadable, "file cannot be read and is left out", "files cannot be read and are left out"),
        (listing.missing, "file of the table is not there", "files of the table are not there"),
        (strangers, "file is not an image and is left out", "files are not images and are left out"),
        (index.found.broken, "link leads nowhere", "links lead nowhere"),
        (index.found.empty, "folder is empty", "folders are empty"),
    ):
        if group:
            findings.append(counted(group, one, many))

    good = np.flatnonzero(kinds == IMAGE)
    if not len(good):
        raise UserError(f"{place} holds no pictures {_EXPECTED[config.name]}")
    rows, splits, labels = listing.rows[good], listing.splits[good], listing.labels[good]
    sets = listing.label_sets

    def having(wrong: Sequence[bool]) -> list[str]:
        found = np.flatnonzero(np.array(wrong, bool)[labels])
        return [f"{names[int(rows[i])]} ({'; '.join(sets[labels[i]])})" for i in found]

    others = having([len(labels) != 1 for labels in sets])
    if several is None:
        several = bool(others)
    if others and several:
        findings.append(counted(others, "picture has several labels, or none", "pictures have several labels, or none"))
    elif others:
        what = "none or several labels, where one is needed (or set config.task=multilabel)"
        raise UserError(counted(others, f"picture has {what}", f"pictures have {what}"))
    used = {label for k in np.unique(labels) for label in sets[k]}
    class_names = _classes(config, known, used, numbers=config.name == "table")
    numbers = {name: k for k, name in enumerate(class_names)}
    outside = having([any(label not in numbers for label in labels) for labels in sets])
    if outside:
        where = f"outside the {len(class_names)} classes of {config.classes or place}"
        raise UserError(counted(outside, f"picture has a label {where}", f"pictures have labels {where}"))
    classes_of = tuple(tuple(sorted({numbers[label] for label in labels if label in numbers})) for labels in sets)
    if several:
        label_sets, label_numbers = classes_of, labels.astype(np.int32)
        if all(len(classes_of[k]) == 1 for k in np.unique(labels)):
            raise UserError(f"every picture of {place} has one label: set config.task=classification")
    else:
        # A set that no picture has, of files that are no images, may be empty.
        label_sets, label_numbers = None, np.array([of[0] if of else -1 for of in classes_of], np.int32)[labels]
    splits = _held_out(splits, index.halves()[rows], config.held_out)
    by_name = {
        name: (rows[splits == k], label_numbers[splits == k]) for k, name in enumerate(SPLITS) if (splits == k).any()
    }
    findings += _about_contents(by_name, index, names)
    findings += _about_classes(by_name, label_sets, class_names)
    counts = ", ".join(f"{len(rows):,} in {name}" for name, (rows, _) in by_name.items())
    findings.insert(0, f"{place}: {len(class_names):,} classes; pictures: {counts}")
    return Pictures(place, in_words(class_names), by_name, label_sets, index, files, tuple(findings))


def _classes(config: DataConfig, known: Sequence[str], found: set[str], *, numbers: bool) -> tuple[str, ...]:
    """Return the classes in label order: as listed by the user or the data set, else sorted."""
    if config.classes:
        try:
            lines = local(config.classes).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"data.classes={config.classes!r} cannot be read: {reason}") from error
        listed = tuple(line.strip() for line in lines if line.strip())
        if len(set(listed)) != len(listed) or not listed:
            raise UserError(f"data.classes={config.classes!r} must name every class once, one a line")
        return listed
    if known:
        return tuple(known)
    whole = numbers and all(name.removeprefix("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int if whole else None))


def _held_out(splits: np.ndarray, halves: np.ndarray, share: float) -> np.ndarray:
    """Return the splits, with a share of the training pictures to validate where there are no others.

    The content alone decides, so a picture stays where it is when others come, and equal pictures stay together. The
    share is the same in every class but for chance.
    """
    splits = np.where(splits < 0, SPLITS.index("train"), splits)
    if share and (splits == SPLITS.index("train")).all():
        drawn = halves[:, 1] / 2.0**64
        splits = np.where(drawn < share, SPLITS.index("validation"), splits)
    return splits


def _about_contents(splits: Mapping[str, tuple[np.ndarray, np.ndarray]], index: Index, names: Strings) -> list[str]:
    """Say which pictures are there twice: within a split, across splits, under two classes."""
    rows = np.concatenate([rows for rows, _ in splits.values()])
    of = np.repeat(np.arange(len(splits)), [len(rows) for rows, _ in splits.values()])
    labels = np.concatenate([labels for _, labels in splits.values()])
    halves = index.halves()[rows]
    first = np.sort(halves[:, 0])
    twice = np.flatnonzero(np.isin(halves[:, 0], first[1:][first[1:] == first[:-1]]))  # few, so the rest is quick
    order = twice[np.lexsort((rows[twice], of[twice], halves[twice, 1], halves[twice, 0]))]
    same = (halves[order][1:] == halves[order][:-1]).all(1)
    pairs = list(zip(order[:-1][same].tolist(), order[1:][same].tolist(), strict=True))
    kinds = list(splits)

    def pair(first: int, second: int) -> str:
        return f"{names[int(rows[first])]} = {names[int(rows[second])]}"

    twice = {f"in {kind} twice": [pair(a, b) for a, b in pairs if of[a] == of[b] == k] for k, kind in enumerate(kinds)}
    twice["in two splits, a leak"] = [pair(a, b) for a, b in pairs if of[a] != of[b]]
    twice["in two classes"] = [pair(a, b) for a, b in pairs if labels[a] != labels[b]]
    return [counted(found, f"picture is {where}", f"pictures are {where}") for where, found in twice.items() if found]


def _about_classes(
    splits: Mapping[str, tuple[np.ndarray, np.ndarray]],
    label_sets: Sequence[tuple[int, ...]] | None,
    class_names: Sequence[str],
) -> list[str]:
    """Say which classes have few pictures, and which lack in a split."""

    def count(labels: np.ndarray) -> np.ndarray:
        if label_sets is not None:
            labels = np.array([label for k in labels for label in label_sets[k]], np.int64)
        return np.bincount(labels, minlength=len(class_names))

    counts = {name: count(labels) for name, (_, labels) in splits.items()}
    told = []
    train = counts.get("train")
    if train is not None:
        few = [f"{class_names[k]} ({train[k]})" for k in np.flatnonzero((train > 0) & (train < FEW)).tolist()]
        if few:
            told.append(counted(few, f"class has under {FEW} pictures to train on", f"classes have under {FEW}"))
    for name, count in counts.items():
        absent = [class_names[k] for k in np.flatnonzero(count == 0).tolist()]
        if absent:
            told.append(counted(absent, f"class has no picture in {name}", f"classes have no picture in {name}"))
    return told


Opened = tuple[Files, Index, Listing, Sequence[str]]


def _folder(place: Path, work: Path | None) -> Opened:
    files = open_files(place)
    index = open_index(files, work)
    return files, index, by_folders(index.found.names), ()


def _table(place: Path, work: Path | None) -> Opened:
    if place.suffix in TABLES:
        if not place.is_file():
            raise UserError(f"data.data_dir={str(place)!r} does not exist: name a table, {', '.join(TABLES)}")
        table = read_table(place)
        names = sorted({relative(row.path, place.parent) for row in table})
        files: Files = Listed(place.parent, tuple(names), place)
        index = open_index(files, work)
        return files, index, by_table(table, index.found.names, place.parent), ()
    files = open_files(place)
    index = open_index(files, work)
    names = list(index.found.names)
    tables = [i for i, name in enumerate(names) if name.endswith(TABLES) and name.count("/") < 2]
    if len(tables) != 1:
        raise UserError(
            f"{place} must hold one table ({', '.join(TABLES)}); it holds {len(tables)}: name the table itself in "
            "data.data_dir"
        )
    name = names[tables[0]]
    table = read_table(place / name, files.read(name, index.found.where[tables[0]]))
    folder = name.rpartition("/")[0]
    if folder:
        table = [row._replace(path=f"{folder}/{row.path}") for row in table]
    return files, index, by_table(table, index.found.names, place), ()


def _hub(place: Path, work: Path | None) -> Opened:
    from evmamba_jax.data.hub import Rows

    files = Rows(place)
    return files, open_index(files, work), files.listing(), files.class_names


def kind_of(place: str) -> str:
    """Return the key of :data:`PLACES` that a place is of, by its form."""
    path = local(place)
    if path.suffix in TABLES:
        return "table"
    saved = ("dataset_dict.json", "dataset_info.json")
    return "hf" if any((path / name).is_file() for name in saved) else "folder"


PLACES: dict[str, Callable[[Path, Path | None], Opened]] = {"folder": _folder, "table": _table, "hf": _hub}
_EXPECTED = {
    "folder": "in train/CLASS/ and val/CLASS/, or in CLASS/",
    "table": "that the table names",
    "hf": "in its image column",
}
