"""Images, and what models make of them: a folder as training reads it, the data of a run, or loose pictures."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from evmamba_jax.analysis.subjects import Subject
from evmamba_jax.answers import Picture
from evmamba_jax.arrays import merge, split
from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.decoding import CorruptImageError
from evmamba_jax.data.device import normalize
from evmamba_jax.data.listing import counted
from evmamba_jax.data.loader import eval_batches
from evmamba_jax.data.pictures import kind_of, open_pictures, open_split
from evmamba_jax.data.readers import Example, LabelledImages
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError
from evmamba_jax.tasks.opening import of_json
from evmamba_jax.training.config import Config
from evmamba_jax.weights.load import meta_of, stated_name

BATCH = 32  # images that a model sees at a time
DATA_HELP = "a folder, zip or tar of CLASS/ or of train/CLASS/ and val/CLASS/, a table, or what Hugging Face saved"


def of_place(place: str, *, held_out: float) -> dict[str, Any]:
    """Return the splits of the user's own pictures by their names; what cannot be read is left out and told on stderr.

    Args:
        place: a folder, a zip, a tar, a table, or a folder that Hugging Face's datasets saved.
        held_out: share of the training pictures that become ``validation`` where there is nothing else to evaluate.

    Raises:
        UserError: nothing is there, or no pictures with a class each.
    """
    config = DataConfig(name=kind_of(place), data_dir=place, held_out=held_out, on_corrupt="skip")
    pictures = open_pictures(config)
    for finding in pictures.findings[1:]:  # the first counts the pictures, which each command tells in its own way
        print(f"data: {finding}", file=sys.stderr)
    return {name: open_split(config, name) for name in pictures.splits}


def of_run(given: str) -> dict[str, Any]:
    """Return the data that a run of classification was made with: ``train`` and ``evaluation``.

    Args:
        given: a model as a command line names it.

    Raises:
        UserError: no run; a run of another task; its data are not there any more.
    """
    name, _, place = given.partition("=")
    meta = meta_of(place or given, name if place else "")
    if "config" not in meta:
        raise UserError(f"{given} is no training run, which would bring its data along: name {DATA_HELP}")
    config = of_json(Config, meta["config"])
    if config.task != "classification":
        raise UserError(
            f"{given} is a run of {stated_name(meta)}, task {config.task}: images with one class are needed"
        )
    parts = {"train": config.data.train_split, "evaluation": config.data.eval_split}
    return {part: open_source(config.data, split) for part, split in parts.items()}


def labels_among(source: Any, class_names: Sequence[str]) -> np.ndarray:
    """Return for each class of some images, (J,), its number among the classes of a model.

    Args:
        source: the images.
        class_names: of the model, one a class.

    Raises:
        UserError: a class that the model does not tell, or twice.
    """
    if source.class_names == tuple(class_names):
        return np.arange(len(class_names))
    places: dict[str, list[int]] = {}
    for number, name in enumerate(class_names):
        places.setdefault(name, []).append(number)
    unknown = [name for name in source.class_names if len(places.get(name, ())) != 1]
    if unknown:
        told = counted(unknown, "class of the images is none of the model's", "classes of the images are none of its")
        raise UserError(f"{told}; {source.name} has {len(source.class_names)} classes, the model {len(class_names)}")
    return np.array([places[name][0] for name in source.class_names])


@dataclasses.dataclass(frozen=True)
class Loose:
    """Pictures whose classes nobody knows, as a source; all are of one class without a name.

    Attributes:
        pictures: the files.
    """

    pictures: Sequence[Picture]
    name, split, class_names = "pictures", "all", ("",)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a record. Raises ``CorruptImageError`` where the file cannot be read."""
        file = self.pictures[index].file
        try:
            return {"image": file.read_bytes(), "label": 0, "id": str(file)}
        except OSError as error:
            raise CorruptImageError(f"{file} cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _NamedImages(LabelledImages):
    """The same images, with the names of their records as ``id``."""

    def decode(self, record: Any) -> Any:
        """Return pixels, label and name."""
        return *super().decode(record), record["id"]

    def evaluate(self, decoded: Any) -> Example:
        """Return the crop of the middle."""
        *image, name = decoded
        return super().evaluate(image) | {"id": np.array(name)}

    def blank(self, *, training: bool) -> Example:
        """Return a black image without a name."""
        return super().blank(training=training) | {"id": np.array("")}


class Told(NamedTuple):
    """What a model makes of some images.

    Attributes:
        index: int (B,), their places in the source.
        names: str (B,), of their files or records.
        images: uint8 (B, S, S, C), as the model sees them.
        labels: int (B,), their classes by the source's numbers.
        scores: float32 (B, K), probabilities of the classes; None of a model without a head.
        embeddings: float32 (B, D), what enters the head.
    """

    index: np.ndarray
    names: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None
    embeddings: np.ndarray


def told(subject: Subject, source: Any) -> Iterator[Told]:
    """Yield what a model makes of all images of a source, batch by batch, in order; progress is shown on stderr.

    Images that cannot be decoded are left out, and how many is told on stderr.

    Args:
        subject: the model.
        source: images with a class each.

    Raises:
        UserError: not one image can be decoded.
    """
    data = dataclasses.replace(subject.data, name=source.name, on_corrupt="skip")
    graphdef, *arrays = split(subject.model)

    @jax.jit
    def forward(arrays: Any, images: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        model = merge(graphdef, *arrays)
        head, model.head = model.head, None
        embeddings = model(normalize(images, data.mean, data.std))
        scores = None if head is None else jax.nn.softmax(head(embeddings).astype(jnp.float32))
        return scores, embeddings.astype(jnp.float32)

    left_out = 0
    batches = eval_batches(data, source, global_batch=min(BATCH, len(source)), reader=_NamedImages(data))
    progress = tqdm(total=len(source), desc=subject.label, unit=" images", mininterval=1.0, leave=False, disable=None)
    with batches, progress:
        for rows in batches:
            scores, embeddings = jax.device_get(forward(arrays, rows["image"]))
            good = rows["weight"] > 0
            left_out += int(rows["corrupt"].sum())
            progress.update(int(good.sum()))
            if good.any():
                about = [rows[name][good] for name in ("index", "id", "image", "label")]
                yield Told(*about, scores=None if scores is None else scores[good], embeddings=embeddings[good])
    if left_out == len(source):
        raise UserError(f"not one of the {left_out:,} images of {source.name} can be read")
    if left_out:
        print(f"left out: {left_out:,} of {len(source):,} images of {source.name} cannot be read", file=sys.stderr)


def view_of(source: Any, index: int, data: DataConfig) -> np.ndarray:
    """Return one image of a source as a model sees it: uint8 (S, S, C)."""
    reader = LabelledImages(data)
    return np.asarray(reader.evaluate(reader.decode(source[index]))["image"])
