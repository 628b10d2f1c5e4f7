"""What segmentation and detection share: a backbone that ``config.model`` names, with heads on it, and the data."""

import abc
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from evmamba_jax.arrays import merge, split
from evmamba_jax.config import Config
from evmamba_jax.data.scenes import CLASSES, GROUND, LENGTHS, SIDE, DigitScenes
from evmamba_jax.data.sources import Description
from evmamba_jax.errors import UserError
from evmamba_jax.tasks.base import Task
from evmamba_jax.weights import Weights
from evmamba_jax.weights.load import Ema, load_composed


class Composed(Task):
    """A task whose model is a backbone with heads.

    Attributes:
        needs: the class of its configurations.
        part: the field of these that says what stands on the backbone.
        example: a config file that shows one.
        truth: what the data must have, in words.
        ground: whether the ground is a class.
    """

    needs: ClassVar[type[Config]]
    part: ClassVar[str]
    example: ClassVar[str]
    truth: ClassVar[str]
    ground: ClassVar[bool] = False

    @classmethod
    def validate(cls, config: Config) -> None:
        """Check the data set, and what is for images of one class."""
        if not isinstance(config, cls.needs):
            raise UserError(f"config.task={config.task!r} needs a {cls.needs.__name__}: see {cls.example}")
        if config.data.name != "digit_scenes":
            raise UserError(f"config.data.name={config.data.name!r} has no {cls.truth}; there is digit_scenes")
        for name in ("mixup", "cutmix", "label_smoothing", "random_erasing", "hflip"):
            if getattr(config.data, name):
                raise UserError(f"config.data.{name} is for images of one class: set it to 0")
        if config.data.image_size != SIDE or config.data.in_channels != 3:
            raise UserError(f"scenes of digits have {SIDE} pixels a side and 3 channels: set data.image_size={SIDE}")

    @property
    def about(self) -> Any:
        """What the configuration says of the heads."""
        return getattr(self.config, self.part)

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
        image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
        jax.eval_shape(lambda arrays, image: merge(graphdef, *arrays)(image), arrays, image)
        return model

    def load(self, place: str | PathLike[str], *, ema: Ema = "better") -> Weights:
        """Return the weights of such a model; of a classifier too, where training goes on from its backbone."""
        name = f"{self.about.name} with {self.config.model.name}"
        part, weights = load_composed(self.model, place, name, backbone=self.config.model.name, ema=ema)
        if part is self.model:
            return weights
        if self.config.eval_only:
            raise UserError(f"{place} holds a backbone, not {name}: train from it, or name weights of the whole")
        _, params, stats = split(self.build_model())
        own = [{f"backbone.{name}": array for name, array in arrays.items()} for arrays in weights[:2]]
        return weights._replace(params={**params, **own[0]}, batch_stats={**stats, **own[1]})

    # The data.

    @classmethod
    def describe(cls, config: Config) -> Description:
        """Return classes and length of the scenes."""
        classes = (GROUND, *CLASSES) if cls.ground else CLASSES
        return Description(classes, LENGTHS["train"], "scenes are made as they are read")

    @classmethod
    def open_source(cls, config: Config, split: str, work: Path | None = None) -> DigitScenes:
        """Open a split."""
        return DigitScenes(split, ground=cls.ground)
