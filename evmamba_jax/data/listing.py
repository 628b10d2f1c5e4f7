"""Which class and which split every picture of a place belongs to: by folders, or by a table."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evmamba_jax.errors import UserError, nearest

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
        labels: of each picture; several where a table names several.
        asides: files that belong to no class or split, in words.
        missing: files that a table names and that are not there.
    """

    rows: np.ndarray
    splits: np.ndarray
    labels: list[tuple[str, ...]]
    asides: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def by_folders(names: Iterable[str]) -> Listing:
    """Read ``train/CLASS/...`` and ``val/CLASS/...`` (also valid, validation, test), or ``CLASS/...`` alone.

    One folder around all of this, as archives have it, is passed over. A class may have folders within.

    Args:
        names: of the files, relative, with ``/``.
    """
    parts = [name.split("/") for name in names]
    outer = _outer(parts)
    by_split = any(len(part) > outer + 1 and split_of(part[outer]) == 0 for part in parts) or all(
        len(part) > outer + 1 and split_of(part[outer]) >= 0 for part in parts
    )
    at = outer + 1 if by_split else outer
    rows, splits, labels, loose, strange = [], [], [], [], {}
    for i, part in enumerate(parts):
        split = split_of(part[outer]) if by_split and len(part) > outer + 1 else -1
        if by_split and split < 0 and len(part) > outer + 1:
            strange[part[outer]] = strange.get(part[outer], 0) + 1
        elif len(part) < at + 2:
            loose.append("/".join(part))
        else:
            rows.append(i)
            splits.append(split)
            labels.append((part[at],))
    asides = [f"the folder {name} is no split, its files are left out ({count})" for name, count in strange.items()]
    asides += [counted(loose, "file lies in no class folder", "files lie in no class folder")] if loose else []
    return Listing(np.array(rows, np.int64), np.array(splits, np.int8), labels, tuple(asides))


def split_of(name: str) -> int:
    """Return the split that a folder or a column calls so, an index into :data:`SPLITS`; -1 for another name."""
    known = _SPLIT_NAMES.get(name.lower())
    return -1 if known is None else SPLITS.index(known)


def _outer(parts: Sequence[Sequence[str]]) -> int:
    """Return how many folders lie around the splits or classes: those that all files share, but for a class."""
    shared: Sequence[str] = min((part[:-1] for part in parts), key=len, default=())
    for part in parts:
        same = [a == b for a, b in zip(shared, part, strict=False)]
        shared = shared[: same.index(False)] if False in same else shared
    for depth, name in enumerate(shared):
        if split_of(name) >= 0:
            return depth
    within = {part[len(shared)] for part in parts if len(part) > len(shared) + 1}
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
    return Listing(
        np.array([at for at, _ in there], np.int64),
        np.array([row.split for _, row in there], np.int8),
        [row.labels for _, row in there],
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


def counted(names: Sequence[str], one: str, many: str) -> str:
    """Return how many there are, in words, and the first of them by name."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} {one if len(names) == 1 else many}: {shown}"
