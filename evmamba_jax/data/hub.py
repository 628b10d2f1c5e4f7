"""A data set that Hugging Face's ``datasets`` saved with ``save_to_disk``, as files: one a row, named SPLIT/ROW."""

from pathlib import Path
from typing import Any

import numpy as np

from evmamba_jax.data.files import Found, Strings
from evmamba_jax.data.listing import SPLITS, Listing, split_of
from evmamba_jax.errors import UserError


class Rows:
    """The rows of a saved data set.

    Attributes:
        place: the folder.
        class_names: of its label column; empty where that holds plain values.

    Raises:
        UserError: ``datasets`` is not installed, nothing of it lies there, or there is no column of images or labels.
    """

    def __init__(self, place: Path):
        self.place = place
        self._open()

    def _open(self) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("data.name='hf' needs Hugging Face's datasets: pip install 'evmamba-jax[hub]'") from error
        try:
            loaded = datasets.load_from_disk(str(self.place))
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.data_dir={str(self.place)!r} is not what datasets' save_to_disk writes: "
                f"{str(error).splitlines()[0]}"
            ) from error
        tables = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
        self._stamp = " ".join(f"{split}={table._fingerprint}" for split, table in sorted(tables.items()))
        features = next(iter(tables.values())).features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        labels = classes or [name for name in ("label", "labels") if name in features]
        if not images or not labels:
            raise UserError(
                f"{self.place} has no column of images with one of labels beside it; it has "
                f"{ {name: type(kind).__name__ for name, kind in features.items()} }"
            )
        self.class_names = tuple(features[labels[0]].names) if classes else ()
        image, label = images[0], labels[0]
        self._tables: dict[str, Any] = {
            str(split): table.select_columns([image, label])
            .rename_columns({image: "image", label: "label"})
            .cast_column("image", datasets.Image(decode=False))
            for split, table in tables.items()
        }

    def __reduce__(self):
        return Rows, (self.place,)

    @property
    def home(self) -> Path:
        """A hidden file in the folder."""
        return self.place / ".evmamba-index.npz"

    def stamp(self, known: str) -> str:
        """Return the fingerprints that ``datasets`` keeps of the tables."""
        return self._stamp

    def find(self) -> Found:
        """List the rows."""
        names = [f"{split}/{row}" for split, table in self._tables.items() for row in range(len(table))]
        where = [(row, 0, 0) for table in self._tables.values() for row in range(len(table))]
        sizes = np.full(len(names), -1, np.int64)  # datasets does not know them
        return Found(Strings.of(names), sizes, np.array(where, np.int64).reshape(-1, 3), self.stamp(""))

    def read(self, name: str, where: np.ndarray) -> bytes:
        """Return the encoded image of a row."""
        image = self._tables[name.partition("/")[0]][int(where[0])]["image"]
        if image is None:
            raise OSError("the row has no image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def listing(self) -> Listing:
        """Return the split and the label of each row."""
        splits, labels = [], []
        sets: dict[tuple[str, ...], int] = {}
        for split, table in self._tables.items():
            at = split_of(split)
            if split and at < 0:
                raise UserError(f"{self.place} has a split {split!r}; known are {', '.join(SPLITS)}")
            splits += [at] * len(table)
            labels += [sets.setdefault((self._label(value),), len(sets)) for value in table["label"]]
        return Listing(np.arange(len(splits)), np.array(splits, np.int8), np.array(labels, np.int64), list(sets))

    def _label(self, value: Any) -> str:
        if self.class_names and 0 <= value < len(self.class_names):
            return self.class_names[value]
        return str(value)
