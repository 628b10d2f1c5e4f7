"""Image classification: soft targets by mixup, cutmix and smoothing; MESA; top-1, top-5 and a count by class.

``config.model`` names one of the registered models; the number of its classes comes from the data.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from evmamba_jax.arrays import merge, split
from evmamba_jax.config import Config
from evmamba_jax.data import device
from evmamba_jax.data.readers import LabelledImages, Reader
from evmamba_jax.data.sources import labels_of
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model, build_model, configuration
from evmamba_jax.reports import classified
from evmamba_jax.reports.confusion import CONFUSION, confusion
from evmamba_jax.reports.drawing import drawn
from evmamba_jax.reports.page import Section
from evmamba_jax.reports.per_class import PER_CLASS, Counts, write_per_class
from evmamba_jax.reports.predictions import predictions
from evmamba_jax.tasks.base import Batch, Collector, Figure, Moment, Task
from evmamba_jax.tasks.registry import register
from evmamba_jax.weights import Weights, load_weights
from evmamba_jax.weights.load import Ema, inner_of

PICTURED = 64  # examples in predictions.png


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: Any = 1.0) -> jax.Array:
    """Soft-target cross-entropy of each example.

    Args:
        logits: (B, K).
        targets: (B, K).
        weights: (K,), factors by class; the mean of the losses over examples is then torch's ``cross_entropy``.

    Returns:
        (B,), float32 or wider.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.losses.softmax_cross_entropy(logits, targets * weights)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array, weights: Any = 1.0) -> jax.Array:
    """Binary cross-entropy of each example, the mean over classes; arguments as for :func:`cross_entropy`.

    Source: timm's ``BinaryCrossEntropy`` with its defaults.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return (weights * optax.losses.sigmoid_binary_cross_entropy(logits, targets)).mean(-1)


LOSSES = {"cross_entropy": cross_entropy, "bce": binary_cross_entropy}


def mesa_divergence(logits: jax.Array, averaged: jax.Array) -> jax.Array:
    """How far the prediction is from the averaged model's: logits (B, classes), both -> scalar float32.

    50 times the mean Kullback-Leibler divergence of softmax(logits / 3) from softmax(averaged / 3).

    Source: MESA (arXiv:2205.14083) as MambaVision's trainer has it.
    """
    student, teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / 3) for x in (logits, averaged))
    return 50 * optax.losses.kl_divergence_with_log_targets(student, teacher).mean()


@register("classification")
class Classification(Task):
    """One label an image."""

    chooses = Figure("top1", higher=True, title="top-1 on the test images (%)")

    @classmethod
    def validate(cls, config: Config) -> None:
        """Check the model's options, and what mixing, MESA and the picture of mistakes need."""
        for name in ("num_classes", "in_channels"):
            if name in config.model.options:
                raise UserError(f"config.model.options has {name!r}, which comes from the data: leave it out")
        configuration(config.model.name, **cls._model_options(config, 0))
        if config.confusion and not config.eval_only:
            raise UserError("config.confusion draws what an evaluation counts; add --config.eval_only=True")
        if config.data.mixup + config.data.cutmix > 0 and config.batch_size % 2:
            raise UserError(
                f"config.batch_size is {config.batch_size}; mixup and cutmix pair images, so it must be even"
            )
        if config.optim.mesa and not config.optim.ema_decay:
            raise UserError(
                f"config.optim.mesa is {config.optim.mesa} and config.optim.ema_decay 0; MESA learns from the moving "
                "average: set ema_decay, or mesa to 0"
            )

        if config.loss.balanced and config.loss.class_weights:
            raise UserError("config.loss.balanced chooses the class weights: leave config.loss.class_weights out")

    def __init__(self, config: Config, class_names: Sequence[str]):
        given = config.loss.class_weights
        self._weights: Any = np.asarray(given, np.float32) if given else 1.0
        super().__init__(config, class_names)

    def see(self, source: Any) -> None:
        """Balance the classes by how many images each has, if the configuration says so."""
        if self.config.loss.balanced:
            counts = np.bincount(labels_of(source), minlength=len(self.class_names))
            # A class without images gives no loss; its weight is 0.
            self._weights = np.where(counts, counts.sum() / (len(counts) * np.maximum(counts, 1)), 0).astype(np.float32)

    def check_lengths(self, *, total_steps: int, steps_per_epoch: int) -> None:
        """Check that MESA begins within the run."""
        mesa_start = self.config.optim.mesa_start.in_steps(steps_per_epoch)
        if self.config.optim.mesa and mesa_start >= total_steps:
            raise UserError(
                f"config.optim.mesa_start is {mesa_start} steps and the whole run {total_steps}: let MESA "
                "begin earlier, or turn it off with --config.optim.mesa=0"
            )

    # The model.

    def abstract_model(self) -> Any:
        """Return the model, traced once for its errors: sizes that it cannot take are found before anything runs."""
        config = self.config
        if config.init_from and "inner" not in config.model.options:
            # Said by the run from now on, which may find its start gone when it goes on.
            config.model.options = dict(config.model.options) | inner_of(config.init_from, config.model.name)
        model = abstract_model(config.model.name, **self._model_options(config, len(self.class_names)))
        graphdef, *arrays = split(model)
        side, channels = config.data.image_size, config.data.in_channels
        image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        jax.eval_shape(lambda arrays, image: merge(graphdef, *arrays)(image), arrays, image)
        return model

    def build_model(self) -> nnx.Module:
        """Return the model with fresh initial values."""
        options = self._model_options(self.config, len(self.class_names))
        return build_model(self.config.model.name, rngs=nnx.Rngs(self.config.seed), **options)

    @staticmethod
    def _model_options(config: Config, num_classes: int) -> dict[str, Any]:
        return {
            "num_classes": num_classes,
            "in_channels": config.data.in_channels,
            "drop_path_rate": config.model.drop_path_rate,
            "remat": config.model.remat,
            "dtype": config.model.dtype,
            **config.model.options,
        }

    def load(self, place: str | os.PathLike[str], *, ema: Ema = "better") -> Weights:
        """Return the weights of a place as the model takes them; see :func:`load_weights`.

        Every process of the run reads for itself. Only training goes on from weights of another grid of patches, or for
        another number of classes, in place of whose head it takes the initial one.
        """
        name = f"{self.config.model.name} for {self.config.data.name}"
        initial = None if self.config.eval_only else self.build_model
        return load_weights(self.model, place, name, variant=self.config.model.name, ema=ema, initial=initial)

    # The data.

    def reader(self) -> Reader:
        """Return the reader of images with labels, which are among the classes."""
        return LabelledImages(self.config.data, len(self.class_names))

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return mixed images in the compute type, and soft targets (B, classes)."""
        images, targets = device.train_augment(
            key, batch["image"], batch["label"], self.config.data, len(self.class_names), self.config.model.dtype
        )
        return {"images": images, "targets": targets}

    def loss(
        self, model: Any, inputs: dict[str, jax.Array], key: jax.Array, moment: Moment
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of the configuration's name, with MESA's term once that begins."""
        logits = model(inputs["images"], key=key)
        loss = LOSSES[self.config.loss.name](logits, inputs["targets"], self._weights).mean()
        if self.config.optim.mesa:
            weight, averaged = self._averaged_logits(inputs["images"], moment)
            loss += weight * mesa_divergence(logits, averaged)
        return loss, {}

    def _averaged_logits(self, images: jax.Array, moment: Moment) -> tuple[jax.Array, jax.Array]:
        """Return the weight of MESA's term, 0 before it begins, and what the averaged model makes of the images."""
        optim = self.config.optim
        begun = moment.step >= optim.mesa_start.in_steps(moment.steps_per_epoch)
        assert moment.averaged is not None  # validate has seen to it
        predict = lambda: moment.averaged()(images)  # noqa: E731
        unused = jnp.zeros((len(images), len(self.class_names)), jax.eval_shape(predict).dtype)
        return jnp.where(begun, optim.mesa, 0.0), jax.lax.cond(begun, predict, lambda: unused)

    # Evaluation.

    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Return the sums of loss, top-1 and top-5, and of each image probabilities, the class found, and the rank.

        The rank (0 is the first) is the true class's. With details the sums have ``by_class`` too: :class:`Counts`.
        """
        data = self.config.data
        images = device.normalize(batch["image"], data.mean, data.std, dtype=self.config.model.dtype)
        logits = model(images).astype(jnp.float32)
        labels, weight = batch["label"], batch["weight"]
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        # The number of classes that score higher; on a tie the lower index wins, as argmax has it. NaN, which no
        # comparison holds for, scores higher than everything: a model that gives it is never right.
        lower = jnp.arange(logits.shape[1]) < labels[:, None]
        rank = (~(logits <= own) | ((logits == own) & lower)).sum(1)
        found = logits.argmax(1)
        sums: dict[str, Any] = {
            "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels) @ weight,
            "top1": (rank < 1) @ weight,
            "top5": (rank < 5) @ weight,
        }
        if detailed:
            sums["by_class"] = count_by_class(labels, weight, found, rank, logits.shape[1])
        scores = jax.nn.softmax(logits)
        return sums, {"scores": scores, "rank": rank, "label": labels, "weight": weight}

    def collector(self, *, pictures: bool) -> Collector | None:
        """Return what chooses the examples of predictions.png."""
        return Gallery() if pictures else None

    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return ``top1`` and ``top5`` (per cent) and ``eval_loss``."""
        examples = float(sums["examples"])
        return {
            "top1": 100 * float(sums["top1"]) / examples,
            "top5": 100 * float(sums["top5"]) / examples,
            "eval_loss": float(sums["loss"]) / examples,
        }

    # For the reader.

    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words."""
        words = f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %"
        if "ema_top1" in figures:
            words += f"; moving average top-1 {figures['ema_top1']:.2f} %, top-5 {figures['ema_top5']:.2f} %"
        return f"{words} ({figures['examples']:.0f} images)"

    def sections(self, collector: Collector, whose: str) -> list[Section]:
        """Return figures, classes, confusion, calibration and telling pictures."""
        assert isinstance(collector, Gallery)
        return classified.sections(collector.answers(), self.class_names, whose)

    def pictures(self, folder: Path, collector: Collector) -> None:
        """Draw predictions.png."""
        assert isinstance(collector, Gallery)
        predictions(folder, *collector.chosen(), self.class_names)

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write per_class.csv and, if asked for, confusion.png of the better of parameters and moving average."""
        counts = {variant: total["by_class"] for variant, total in sums.items()}
        write_per_class(folder, counts, self.class_names)
        title = whose + (", moving average" if best == "ema" else "")
        draw = lambda: confusion(folder, counts[best].confusion, self.class_names, title)  # noqa: E731
        if not self.config.confusion or not drawn(CONFUSION, draw):
            return [PER_CLASS]
        return [PER_CLASS, CONFUSION]


def count_by_class(labels: jax.Array, weight: jax.Array, found: jax.Array, rank: jax.Array, classes: int) -> Counts:
    """Count a batch's answers by class.

    Args:
        labels: int32 (B,), the true classes.
        weight: (B,), 0 where an image does not count: padding, and what cannot be read.
        found: int32 (B,), the classes that they are taken for.
        rank: int32 (B,), how many classes score higher than the true one.
        classes: K.
    """
    # A few kB from every device to all; sums of K x K from every device would be megabytes.
    if not jax.sharding.get_abstract_mesh().empty:
        labels, weight, found, rank = (
            jax.lax.with_sharding_constraint(array, PartitionSpec()) for array in (labels, weight, found, rank)
        )
    real = weight > 0
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    return Counts(
        zeros(classes, classes).at[labels, found].add(real.astype(jnp.int32)),
        zeros(classes).at[labels].add((real & (rank < 1)).astype(jnp.int32)),
        zeros(classes).at[labels].add((real & (rank < 5)).astype(jnp.int32)),
    )


class Gallery(Collector):
    """The examples of predictions.png, wrong ones first, then right ones; and the answers that report.html needs."""

    def __init__(self):
        self.wrong: list[tuple] = []
        self.right: list[tuple] = []
        self._labels: list[np.ndarray] = []
        self._scores: list[np.ndarray] = []
        self._surest: dict[bool, list[tuple[float, int, np.ndarray]]] = {True: [], False: []}  # by whether it is right
        self._noted = 0

    def add(self, rows: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray], own: slice) -> None:
        """Note the answers to a batch, and of this process's examples those to be shown."""
        real = answers["weight"] > 0
        numbers = self._noted + np.cumsum(real) - 1  # of each example among those that count
        self._labels.append(answers["label"][real])
        self._scores.append(answers["scores"][real])
        self._noted += int(real.sum())
        columns = rows["image"], rows["label"], rows["weight"], answers["scores"][own], numbers[own]
        for image, label, weight, shares, number in zip(*columns, strict=True):
            if not weight:
                continue
            found, probability = int(shares.argmax()), float(shares.max())
            kept = self.right if found == label else self.wrong
            if len(kept) < PICTURED:
                kept.append((image, label, found, probability))
            surest = self._surest[found == label]
            if len(surest) < classified.SHOWN or probability > surest[-1][0]:
                surest.append((probability, int(number), image))
                surest.sort(key=lambda entry: (-entry[0], entry[1]))
                del surest[classified.SHOWN :]

    def answers(self) -> classified.Answers:
        """Return the answers to all examples."""
        wrong, right = ([(index, image) for _, index, image in self._surest[kind]] for kind in (False, True))
        return classified.Answers(np.concatenate(self._labels), np.concatenate(self._scores), wrong, right)

    def chosen(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return images, labels, classes found and their probabilities."""
        rows = (self.wrong + self.right)[:PICTURED]
        images, labels, found, probabilities = (np.stack(column) for column in zip(*rows, strict=True))
        return images, labels, found, probabilities
