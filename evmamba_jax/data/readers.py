"""How a record becomes an example: what one task reads otherwise than another."""

import dataclasses
from typing import Any, Protocol

import numpy as np

from evmamba_jax.data.config import DataConfig
from evmamba_jax.data.transforms import eval_crop, read_pixels, train_view
from evmamba_jax.errors import UserError

Example = dict[str, np.ndarray | np.generic]


class Reader(Protocol):
    """From the records of a source to examples, whose arrays the loader stacks to batches.

    All examples for training have the same names, shapes and dtypes, and so have all for evaluation; ``image`` is among
    the names. Worker processes get a copy of the reader, so it can be pickled.
    """

    def decode(self, record: Any) -> Any:
        """Return what is in a record. Raises ``CorruptImageError`` where it cannot be decoded."""
        ...

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return an augmented example for training; the draws of ``rng`` alone decide the result."""
        ...

    def evaluate(self, decoded: Any) -> Example:
        """Return an example for evaluation."""
        ...

    def blank(self, *, training: bool) -> Example:
        """Return an example of zeros: the shapes of all others, and what fills the last batch of an evaluation."""
        ...


Shape = tuple[int, ...]  # whatever tells the shapes of an example's arrays
Size = tuple[int, int]  # height and width of an image as it is stored, pixels


class ShapedReader(Reader, Protocol):
    """A reader whose examples have different shapes; each batch is of one.

    Its source has ``sizes``, int (N, 2), the ``Size`` of each image.
    """

    def train_shape(self, size: Size, rng: np.random.Generator) -> Shape:
        """Return the shape that ``train`` will give an image, from the same draws of an ``rng`` of the same seed."""
        ...

    def eval_shape(self, size: Size) -> Shape:
        """Return the shape that ``evaluate`` will give an image."""
        ...

    def blank(self, *, training: bool, shape: Shape | None = None) -> Example:
        """Return an example of zeros, of a shape; by default of the one that most examples for training have."""
        ...


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Images with a class each: ``image`` uint8 (H, W, C) and ``label`` int32 ().

    Attributes:
        config: reads the host-side fields.
        num_classes: of the data set; None where any label will do.
    """

    config: DataConfig
    num_classes: int | None = None

    def decode(self, record: Any) -> Any:
        """Return pixels and label; raises a UserError for a label that is none of the classes."""
        label = int(record["label"])
        if self.num_classes is not None and not 0 <= label < self.num_classes:
            raise UserError(
                f"image {record['id']} of {self.config.name} has the label {label}; of its {self.num_classes} classes "
                f"the labels are 0 to {self.num_classes - 1}: mend the data set, and prepare it again"
            )
        return read_pixels(record["image"], self.config), np.int32(label)

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return a random crop, augmented."""
        pixels, label = decoded
        return {"image": train_view(pixels, self.config, rng), "label": label}

    def evaluate(self, decoded: Any) -> Example:
        """Return the crop of the middle."""
        pixels, label = decoded
        return {"image": eval_crop(pixels, self.config), "label": label}

    def blank(self, *, training: bool) -> Example:
        """Return a black image of class 0."""
        return {"image": _black(self.config), "label": np.int32(0)}


@dataclasses.dataclass(frozen=True)
class MultiLabelImages:
    """Images with any number of classes each: ``image`` uint8 (H, W, C) and ``labels`` float32 (K,), 0 or 1.

    Attributes:
        config: reads the host-side fields.
        num_classes: K.
    """

    config: DataConfig
    num_classes: int

    def decode(self, record: Any) -> Any:
        """Return pixels and labels."""
        labels = np.zeros(self.num_classes, np.float32)
        labels[list(record["labels"])] = 1
        return read_pixels(record["image"], self.config), labels

    def train(self, decoded: Any, rng: np.random.Generator) -> Example:
        """Return a random crop, augmented."""
        pixels, labels = decoded
        return {"image": train_view(pixels, self.config, rng), "labels": labels}

    def evaluate(self, decoded: Any) -> Example:
        """Return the crop of the middle."""
        pixels, labels = decoded
        return {"image": eval_crop(pixels, self.config), "labels": labels}

    def blank(self, *, training: bool) -> Example:
        """Return a black image of no class."""
        return {"image": _black(self.config), "labels": np.zeros(self.num_classes, np.float32)}


def _black(config: DataConfig) -> np.ndarray:
    return np.zeros((config.image_size, config.image_size, config.in_channels), np.uint8)
