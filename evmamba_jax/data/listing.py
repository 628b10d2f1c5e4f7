"""Which class and which split every picture of a place belongs to: by folders, or by a table."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.errors import UserError, nearest, printable

SPLITS = ("train", "validation", "test")
# What folders and columns call them; in any case.
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


class Listing(NamedTuple):
    """The pictures that a data set names.

    Attributes:
        rows: int64 (N,), the place of each in the names of the files.
        splits: int8 (N,), an index into :data:`SPLITS`; -1 where none is named.
        labels: int64 (N,), an index into ``label_sets``.
        label_sets: the labels that pictures have: one, or several or none where a table says so.
        asides: files that belong to no class or split, in words.
        missing: files that a table names and that are not there.
    """

    rows: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    label_sets: Sequence[tuple[str, ...]]
    asides: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def by_folders(names: Iterable[str]) -> Listing:
    """Read ``train/CLASS/...`` and ``val/CLASS/...`` (also valid, validation, test), or ``CLASS/...`` alone.

    One folder around all of this, as archives have it, is passed over. A class may have folders within.

    Args:
        names: of the files, relative, with ``/``.
    """
    names = list(names)
    # A million files lie in some thousand folders: what a folder is, is settled once.
    seen: dict[str, int] = {}
    folder_of = np.array([seen.setdefault(name[: max(0, name.rfind("/"))], len(seen)) for name in names], np.int64)
    folders = [folder.split("/") if folder else [] for folder in seen]
    outer = _outer(folders)
    within = [folder[outer] for folder in folders if len(folder) > outer]
    by_split = any(split_of(name) == 0 for name in within) or all(split_of(name) >= 0 for name in within)
    at = outer + 1 if by_split else outer
    splits = np.array([split_of(f[outer]) if by_split and len(f) > outer else -1 for f in folders], np.int8)
    classes: dict[tuple[str, ...], int] = {}
    labels = np.array([classes.setdefault((f[at],), len(classes)) if len(f) > at else -1 for f in folders], np.int64)
    strange = by_split & (splits < 0) & np.array([len(folder) > outer for folder in folders], bool)
    labels[strange] = -1

    counts = np.bincount(folder_of, minlength=len(folders))
    asides = []
    for name in dict.fromkeys(folders[k][outer] for k in np.flatnonzero(strange)):
        count = sum(counts[k] for k in np.flatnonzero(strange) if folders[k][outer] == name)
        asides.append(f"the folder {name} is no split, its files are left out ({count})")
    loose = [names[i] for i in np.flatnonzero(((labels < 0) & ~strange)[folder_of])]
    if loose:
        asides.append(counted(loose, "file lies in no class folder", "files lie in no class folder"))
    rows = np.flatnonzero(labels[folder_of] >= 0)
    return Listing(rows, splits[folder_of[rows]], labels[folder_of[rows]], list(classes), tuple(asides))


def split_of(name: str) -> int:
    """Return the split that a folder or a column calls so, an index into :data:`SPLITS`; -1 for another name."""
    known = _SPLIT_NAMES.get(name.lower())
    return -1 if known is None else SPLITS.index(known)


def _outer(folders: Sequence[Sequence[str]]) -> int:
    """Return how many folders lie around the splits or classes: those that all files share, but for a class."""
    shared: Sequence[str] = min(folders, key=len, default=())
    for folder in folders:
        same = [a == b for a, b in zip(shared, folder, strict=False)]
        shared = shared[: same.index(False)] if False in same else shared
    for depth, name in enumerate(shared):
        if split_of(name) >= 0:
            return depth
    within = {folder[len(shared)] for folder in folders if len(folder) > len(shared)}
    around = len(within) > 1 or any(split_of(name) >= 0 for name in within)
    return len(shared) if around else max(0, len(shared) - 1)


class Row(NamedTuple):
    """One row of a table: the path as it stands there, the labels, and an index into :data:`SPLITS` or -1."""

    path: str
    labels: tuple[str, ...]
    split: int


def read_table(path: Path, text: bytes | None = None) -> list[Row]:
    """Read a table of ``path``, ``label`` (several joined by ``;``) and, if it has it, ``split``.

    Args:
        path: of the table: .csv, .tsv, .jsonl or .parquet.
        text: the table's bytes, where it lies in an archive.

    Raises:
        UserError: the table cannot be read, lacks a column or a value, or a row names a split that is none.
    """
    rows = []
    for number, record in enumerate(_records(path, text), 1):
        name, label = record.get("path"), record.get("label")
        lacking = "path" if name in (None, "") else "label" if label is None else ""
        if lacking:
            raise UserError(
                f"{path}: row {number} has no {lacking!r}; the columns 'path' and 'label' are needed, it has "
                f"{sorted(str(key) for key in record)}"
            )
        split = str(record.get("split") or "")
        if split and split_of(split) < 0:
            known = sorted(_SPLIT_NAMES)
            raise UserError(f"{path}: row {number} has split {split!r}{nearest(split, known)}; allowed: {known}")
        several = label if isinstance(label, list | tuple) else str(label).split(";")
        labels = tuple(str(one).strip() for one in several if str(one).strip())
        rows.append(Row(str(name), labels, split_of(split) if split else -1))
    if not rows:
        raise UserError(f"the table {path} has no rows")
    return rows


def by_table(table: Sequence[Row], names: Sequence[str], place: Path) -> Listing:
    """Find the rows of a table among the names of the files at a place."""
    places = {name: i for i, name in enumerate(names)}
    found = [(places.get(relative(row.path, place)), row) for row in table]
    missing = [row.path for at, row in found if at is None]
    there = [(at, row) for at, row in found if at is not None]
    sets: dict[tuple[str, ...], int] = {}
    return Listing(
        np.array([at for at, _ in there], np.int64),
        np.array([row.split for _, row in there], np.int8),
        np.array([sets.setdefault(row.labels, len(sets)) for _, row in there], np.int64),
        list(sets),
        missing=tuple(missing),
    )


def relative(name: str, place: Path) -> str:
    """Return a path of a table as the files have it: relative to their place, with ``/``."""
    inside = Path(name)
    if inside.is_absolute() and inside.is_relative_to(place):
        inside = inside.relative_to(place)
    return inside.as_posix()


def _records(path: Path, text: bytes | None) -> Iterator[Mapping[str, Any]]:
    try:
        data = path.read_bytes() if text is None else text
        if path.suffix == ".parquet":
            yield from _parquet(path, data)
            return
        lines = io.StringIO(data.decode("utf-8-sig"), newline="")
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise UserError(f'{path}: line {number} is no object such as {{"path": ..., "label": ...}}')
                    yield record
            return
        yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the table {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _parquet(path: Path, data: bytes) -> list[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path} is read with pyarrow: pip install 'evmamba-jax[hub]', or save it as .csv") from error
    try:
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"the table {path} cannot be read: {str(error).splitlines()[0]}") from error


def counted(names: Sequence[str], one: str, many: str, most: int = 3) -> str:
    """Return how many there are, in words, and the first of them, ``most`` of them, by name."""
    shown = ", ".join(map(printable, names[:most])) + (", ..." if len(names) > most else "")
    return f"{len(names):,} {one if len(names) == 1 else many}: {shown}"
