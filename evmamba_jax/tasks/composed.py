"""What segmentation and detection share: a backbone that ``config.model`` names, with heads on it, and the data."""

import abc
import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.config import Config
from evmamba_jax.data.dense import describe_dense, open_dense
from evmamba_jax.data.dense_config import DenseData
from evmamba_jax.data.device import normalize, without_padding
from evmamba_jax.data.readers import Example, Size
from evmamba_jax.data.scenes import CLASSES, GROUND, LENGTHS, SIDE, DigitScenes
from evmamba_jax.data.sources import Description
from evmamba_jax.errors import UserError
from evmamba_jax.tasks.base import Batch, Task
from evmamba_jax.weights import Weights
from evmamba_jax.weights.load import Ema, load_composed

SCENES = "digit_scenes"
# Fields of the data that do nothing here.
_OF_ONE_CLASS = (
    *("mixup", "cutmix", "label_smoothing", "random_erasing", "balanced", "auto_augment", "color_jitter", "pad_crop"),
    *("repeated_aug", "classes", "held_out"),
)


class Composed(Task):
    """A task whose model is a backbone with heads.

    Attributes:
        needs: the class of its configurations.
        reads: the class of what they say of the data.
        part: the field of these that says what stands on the backbone.
        example: a config file that shows one.
        kind: of the data, as :mod:`evmamba_jax.data.dense` has them.
        truth: the same in words.
        ground: whether the ground is a class.
        layers: paths of the layers that tell classes.
    """

    head = "[!b]*"  # all but the backbone

    needs: ClassVar[type[Config]]
    reads: ClassVar[type[DenseData]]
    kind: ClassVar[str]
    part: ClassVar[str]
    example: ClassVar[str]
    truth: ClassVar[str]
    ground: ClassVar[bool] = False
    layers: tuple[str, ...]

    @classmethod
    def validate(cls, config: Config) -> None:
        """Check the data set, and what is for images of one class."""
        if not isinstance(config, cls.needs):
            raise UserError(f"config.task={config.task!r} needs a {cls.needs.__name__}: see {cls.example}")
        for name in _OF_ONE_CLASS:
            own = getattr(cls.reads, name)
            if getattr(config.data, name) != own:
                raise UserError(f"config.data.{name} is for images of one class: leave it at {own!r}")
        if config.loss.balanced or config.loss.name != "cross_entropy":
            raise UserError("config.loss.name and balanced are for images of one class: leave them out")
        if config.data.in_channels != 3:
            raise UserError(
                f"config.data.in_channels={config.data.in_channels}: images with {cls.truth} have 3 channels"
            )
        if config.data.name == SCENES and config.data.image_size != SIDE:
            raise UserError(f"scenes of digits have {SIDE} pixels a side: set data.image_size={SIDE}")

    @property
    def about(self) -> Any:
        """What the configuration says of the heads."""
        return getattr(self.config, self.part)

    @property
    def data(self) -> Any:
        """What it says of the data."""
        return self.config.data

    # The model.

    @abc.abstractmethod
    def create(self, **shared: Any) -> Any:
        """Return the model; ``shared`` are the arguments that every model of a backbone with heads has."""

    def build_model(self) -> Any:
        """Return the model with fresh initial values."""
        model = self.config.model
        options = {"drop_path_rate": model.drop_path_rate, "remat": model.remat, **model.options}
        return self.create(
            name=self.about.name,
            backbone=model.name,
            num_classes=len(self.class_names),
            width=self.about.width,
            dtype=jnp.dtype(model.dtype),
            rngs=nnx.Rngs(self.config.seed),
            backbone_options=options,
        )

    def abstract_model(self) -> Any:
        """Return the model, traced once for its errors."""
        model = nnx.eval_shape(self.build_model)
        model.eval()
        graphdef, *arrays = split(model)
        image = jax.ShapeDtypeStruct((1, *self.reader().blank(training=True)["image"].shape), jnp.float32)
        jax.eval_shape(lambda arrays, image: merge(graphdef, *arrays)(image), arrays, image)
        return model

    def load(self, place: str | PathLike[str], *, ema: Ema = "better", key: str | None = None) -> Weights:
        """Return the weights of such a model.

        To train on, of a classifier too, which fill the backbone, and of such a model for other classes.
        """
        backbone, initial = self.config.model.name, None if self.config.eval_only else self.build_model
        name, how = f"{self.about.name} with {backbone}", {"ema": ema, "key": key, "initial": initial}
        part, weights = load_composed(self.model, place, name, backbone=backbone, layers=self.layers, **how)
        if part is self.model:
            return weights
        if self.config.eval_only:
            raise UserError(f"{place} holds a backbone, not {name}: train from it, or name weights of the whole")
        _, params, stats = split(self.build_model())
        own = [{f"backbone.{name}": array for name, array in arrays.items()} for arrays in weights[:2]]
        return weights._replace(params={**params, **own[0]}, batch_stats={**stats, **own[1]})

    # The data.

    def normalized(self, batch: Batch) -> jax.Array:
        """Return the images of a batch, normalised, with zeros for padding."""
        return without_padding(normalize(batch["image"], self.data.mean, self.data.std), batch["size"])

    def padded_reader(self, padding: str) -> Any:
        """Return the reader of an evaluation with a padding, as ``config.data.eval_padding`` has it."""
        reader: Any = self.reader()
        return dataclasses.replace(reader, config=dataclasses.replace(self.data, eval_padding=padding))

    def check_size(self, size: Size) -> None:
        """Raise a UserError for a picture so long that nothing is left of its short side at the scale of the test."""
        if not all(self.padded_reader("exact").eval_shape(size)):
            long, short = max(self.data.scale), min(self.data.scale)
            raise UserError(
                f"{size[1]} x {size[0]} pixels are too long a strip: nothing is left of it within {long} x {short}"
            )

    def unlabelled(self, pixels: np.ndarray, padding: str) -> Example:
        """Return a picture without truth, prepared as an evaluation prepares it.

        Args:
            pixels: uint8 (H, W, 3), of a size that ``check_size`` lets pass.
            padding: as ``config.data.eval_padding``.
        """
        return self.alone(self.padded_reader(padding), pixels)

    @abc.abstractmethod
    def alone(self, reader: Any, pixels: np.ndarray) -> Example:
        """Return what ``reader`` makes of a picture without truth, for evaluation."""

    @abc.abstractmethod
    def answers(self, model: Any, batch: Batch) -> Any:
        """Return what is found in a batch for evaluation: arrays whose first axis is the batch's; traced."""

    @abc.abstractmethod
    def found(self, answers: Any, size: Size) -> Any:
        """Return what is found in one picture of ``size``, of the answers for it alone, as NumPy arrays."""

    @classmethod
    def describe(cls, config: Config) -> Description:
        """Return classes and length of the data."""
        if config.data.name == SCENES:
            classes = (GROUND, *CLASSES) if cls.ground else CLASSES
            return Description(classes, LENGTHS["train"], "scenes are made as they are read")
        return describe_dense(config.data.name, config.data.data_dir, config.data.train_split)

    @classmethod
    def open_source(cls, config: Config, split: str, work: Path | None = None) -> Any:
        """Open a split."""
        if config.data.name == SCENES:
            return DigitScenes(split, ground=cls.ground)
        source = open_dense(config.data.name, config.data.data_dir, split)
        if source.kind != cls.kind:
            raise UserError(f"config.data.name={config.data.name!r} has no {cls.truth}: config.task={config.task!r}")
        return source

    def eval_batch(self, devices: int) -> int:
        """Return one image a device where each has the padding of the official test."""
        return devices if self.data.eval_padding == "exact" else self.config.batch_size
