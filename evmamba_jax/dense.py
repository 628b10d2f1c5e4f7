"""What a segmenter or detector finds in pictures of any size.

A picture is prepared as the evaluation of its run does it, and what is found is in the picture's own pixels.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import jax
import numpy as np

from evmamba_jax.arrays import merge, split
from evmamba_jax.data.opencv import size_of
from evmamba_jax.errors import UserError
from evmamba_jax.preprocessing import named, pixels
from evmamba_jax.tasks.opening import open_composed
from evmamba_jax.weights.load import Ema

EXACT_SIZES = 8  # sizes of pictures that get the padding of the evaluation; further ones are padded to buckets


class DensePredictor:
    """A segmenter or detector with its weights, and all else that a prediction depends on.

    Pictures go one after another. Each shape takes a program of its own, which is compiled once. Where the evaluation
    pads exactly, so do the first eight shapes of pictures; any further shape is padded to one of few, the buckets, so
    that many pictures of all sizes take few programs.

    Args:
        weights: a training run, one of its checkpoints, a converted model, or a file of official weights.
        name: of the model, such as "upernet:vmamba_t"; not needed for a folder, which names it.
        ema: as for :class:`evmamba_jax.predict.Predictor`.
        class_names: one a class, where the run has others.

    Attributes:
        name: of the model.
        taken: the weights, in words.
        kind: "label_maps" or "boxes".
        class_names: one a class: as given, else as the run's data set has them, else ADE20K's for a segmenter with 150
            classes and COCO's for a detector with 80, else numbers.
        bucketed: how many pictures were padded to buckets though the evaluation pads exactly.

    Raises:
        UserError: weights or model that are missing or do not fit each other, too many names or too few.
    """

    def __init__(
        self,
        weights: str | PathLike[str],
        name: str = "",
        *,
        ema: Ema = "better",
        class_names: Sequence[str] | None = None,
    ):
        self.task, model, self.name, found = open_composed(weights, name, ema=ema, class_names=class_names)
        self.taken, self.kind, self.class_names = found.taken, self.task.kind, self.task.class_names
        self.bucketed = 0
        self._shapes: set[tuple[int, ...]] = set()
        graphdef, *self._arrays = split(model)
        self._answers = jax.jit(lambda arrays, batch: self.task.answers(merge(graphdef, *arrays), batch))

    def view(self, picture: Any) -> np.ndarray:
        """Return the pixels of a picture, turned as the run turns its images.

        Args:
            picture: a path, the bytes of a file, a PIL image, or an array, as :func:`preprocess` takes it.

        Returns:
            uint8 (H, W, 3).

        Raises:
            UserError: it cannot be read, or is too long for the model.
        """
        image = pixels(picture, self.task.data)
        try:
            self.task.check_size(size_of(image))
        except UserError as error:
            raise UserError(f"{named(picture)}: {error}") from error
        return image

    def __call__(self, image: np.ndarray) -> Any:
        """Return what is found in a picture.

        Args:
            image: uint8 (H, W, 3), as ``view`` gives it.

        Returns:
            Of a segmenter the label map, uint8 (H, W). Of a detector boxes (D, 4), x0 y0 x1 y1 in pixels, scores (D,)
            and labels (D,), the surest first, as :class:`evmamba_jax.detection.evaluate.Found`.
        """
        padding = self.task.data.eval_padding
        example = self.task.unlabelled(image, padding)
        if padding == "exact":
            shape = example["image"].shape
            if shape not in self._shapes and len(self._shapes) == EXACT_SIZES:
                self.bucketed += 1
                example = self.task.unlabelled(image, "buckets")
            else:
                self._shapes.add(shape)
        answers = self._answers(self._arrays, {name: np.expand_dims(array, 0) for name, array in example.items()})
        return self.task.found(jax.tree.map(lambda array: np.asarray(array)[0], answers), size_of(image))

    def at_once(self) -> int:
        """Return how many pictures are answered for at a time."""
        return 1

    def remarks(self) -> list[str]:
        """Return what is to be said of the answers given so far."""
        if not self.bucketed:
            return []
        return [
            f"{self.bucketed} pictures are of a ninth size or a further one: they were padded to one of few sizes, and "
            "their answers may differ a little from those of the evaluation's padding"
        ]

    def each(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Return what is found in each of several pictures."""
        return [self(image) for image in images]
