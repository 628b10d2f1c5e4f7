"""Semantic segmentation: a class for every pixel; mean intersection over union as mmseg counts it.

``config.model`` names the backbone, ``config.segmenter`` what stands on it; the classes come from the data.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax.config import Config
from evmamba_jax.data.dense_config import SegmentationData
from evmamba_jax.data.mmseg import LabelMaps, padded
from evmamba_jax.data.opencv import size_of
from evmamba_jax.data.readers import Example, Size
from evmamba_jax.heads.resize import bilinear_part
from evmamba_jax.ranges import chosen, free, ranged
from evmamba_jax.reports.label_maps import LABEL_MAPS, draw_label_maps
from evmamba_jax.reports.per_class import PER_CLASS, per_cent, write_columns
from evmamba_jax.segmentation import create_segmenter, slide, whole
from evmamba_jax.segmentation.losses import IGNORED, cross_entropy
from evmamba_jax.tasks.base import Batch, Collector, Figure, Moment
from evmamba_jax.tasks.composed import Composed
from evmamba_jax.tasks.registry import register

PICTURED = 12  # images in label_maps.png
GRAIN = 128  # pixels: the rows of a label map for evaluation are a multiple
_AT_ONCE = 2**19  # pixels of a label map whose logits are in memory
_LEAST = 32  # pixels of a side: of the coarsest map's stride


@dataclasses.dataclass
class SegmenterConfig:
    """What stands on the backbone; see :func:`evmamba_jax.segmentation.create_segmenter`."""

    name: str = chosen("upernet", ("upernet",))
    width: int = ranged(512, least=1)
    aux_width: int = ranged(256, least=1)
    dropout: float = ranged(0.1, least=0, below=1)
    init_std: float = ranged(0.01, above=0)


@dataclasses.dataclass
class SegmentationConfig(Config):
    """A run that segments."""

    task: str = free("segmentation")
    # Of its own class, so that the command line knows its fields.
    data: SegmentationData = dataclasses.field(default_factory=SegmentationData)  # pyrefly: ignore[bad-override-mutable-attribute]
    segmenter: SegmenterConfig = dataclasses.field(default_factory=SegmenterConfig)


class Counts(NamedTuple):
    """Pixels of an evaluation by class, int32 (K,): up to two thousand million of each."""

    right: Any
    labelled: Any
    found: Any

    def figures(self) -> tuple[np.ndarray, np.ndarray]:
        """Return intersection over union and accuracy of each class, per cent; NaN of a class that is nowhere."""
        right, labelled, found = (np.asarray(count, np.float64) for count in self)
        with np.errstate(invalid="ignore", divide="ignore"):
            return 100 * right / (labelled + found - right), 100 * right / labelled


def _one_of_few(side: int) -> int:
    """Return the next of 128, 256, 384, 512, 768, 1024, 1536, ... pixels: programs for few shapes do for all maps."""
    doubled = GRAIN << max(math.ceil(math.log2(side / GRAIN)), 0)
    return 3 * doubled // 4 if doubled >= 4 * GRAIN and side <= 3 * doubled // 4 else doubled


class Worst(Collector):
    """The images with the least right pixels, with truth and answer."""

    def __init__(self):
        self.kept: list[tuple[float, int, np.ndarray, np.ndarray, np.ndarray]] = []
        self._seen = 0

    def add(self, rows: Mapping[str, np.ndarray], answers: Any, own: slice) -> None:
        """Keep the worst of a batch and of those before."""
        columns = (rows[name] for name in ("image", "size", "label_map", "original", "weight"))
        for image, size, truth, original, weight, found in zip(*columns, answers[own], strict=True):
            if weight:
                (height, width), (rows_of, columns_of) = size, original
                image, truth, found = image[:height, :width], truth[:rows_of, :columns_of], found[:rows_of, :columns_of]
                counted = truth != IGNORED
                share = float((found == truth)[counted].mean()) if counted.any() else 1.0
                self.kept.append((share, self._seen, image, truth, found))
                self._seen += 1
        self.kept.sort(key=lambda one: one[:2])
        del self.kept[PICTURED:]


def mirror(image: jax.Array, size: jax.Array) -> jax.Array:
    """Return an image (H, W, C) mirrored, left to right, within the columns that ``size`` counts."""
    columns, width = jnp.arange(image.shape[1]), size[1]
    return jnp.take(image, jnp.where(columns < width, width - 1 - columns, columns), axis=1)


def mean_logits(
    views: Sequence[tuple[jax.Array, jax.Array]], wanted: jax.Array, canvas: tuple[int, int], top: jax.Array
) -> jax.Array:
    """Return the logits of one view at another size, or the logarithms of the mean probabilities of several.

    Args:
        views: logits (H, W, K) of each, and its rows and columns without padding.
        wanted: rows and columns of the result without padding.
        canvas: rows and columns of the part that is computed.
        top: the row of the whole result with which this part begins.
    """
    resized = (bilinear_part(logits, size, wanted, canvas, top) for logits, size in views)
    if len(views) == 1:
        return next(resized)
    total = functools.reduce(jnp.add, (jax.nn.softmax(logits) for logits in resized))
    return jnp.log(jnp.maximum(total / len(views), jnp.finfo(total.dtype).tiny))


@register("segmentation")
class Segmentation(Composed):
    """A class for every pixel."""

    chooses = Figure("mIoU", higher=True, title="mean IoU on the test images (%)")
    parts = ("aux_loss", "accuracy")
    needs, reads, part = SegmentationConfig, SegmentationData, "segmenter"
    example = "configs/digits_segmentation.py"
    kind, truth, ground = "label_maps", "label maps", True
    layers = ("decode_head.classifier.conv", "auxiliary_head.classifier.conv")

    def create(self, **shared: Any) -> Any:
        """Return the segmenter."""
        own = ("aux_width", "dropout", "init_std")
        return create_segmenter(**shared, **{name: getattr(self.about, name) for name in own})

    def reader(self) -> LabelMaps:
        """Return what prepares images and label maps."""
        return LabelMaps(self.data)

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return normalised images and label maps."""
        return {"image": self.normalized(batch), "label_map": batch["label_map"]}

    def loss(
        self, model: Any, inputs: dict[str, jax.Array], key: jax.Array, moment: Moment
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the loss of both heads; its auxiliary part and the accuracy over pixels."""
        weights = self.config.loss.class_weights
        total, parts = model.loss(inputs["image"], inputs["label_map"], class_weights=weights, key=key)
        return total, {name: parts[name] for name in self.parts}

    # Evaluation.

    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], jax.Array]:
        """Return the sums of loss and of pixels by class, and the label maps found (B, H, W)."""

        def judged(logits: jax.Array, found: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, Counts]:
            counted, classes = labels != IGNORED, jnp.arange(logits.shape[-1])

            def count(maps: jax.Array, where: jax.Array) -> jax.Array:
                return ((maps[..., None] == classes) & where[..., None]).sum((0, 1), dtype=jnp.int32)

            counts = Counts(count(labels, counted & (found == labels)), count(labels, counted), count(found, counted))
            return found, cross_entropy(logits, labels) * labels.size, counts

        found, losses, counts = self._by_strips(model, batch, judged)
        counts = jax.tree.map(lambda count: count.sum(1), counts)
        losses = losses.sum(1) / jnp.maximum(counts.labelled.sum(-1), 1)
        own = (batch["weight"] > 0).astype(jnp.int32)
        sums = {"loss": losses @ batch["weight"], "counts": jax.tree.map(lambda count: own @ count, counts)}
        return sums, found.reshape(batch["label_map"].shape)

    def answers(self, model: Any, batch: Batch) -> jax.Array:
        """Return the label maps found, uint8 (B, H, W); of ``batch["label_map"]`` only the shape matters."""
        found = self._by_strips(model, batch, lambda logits, found, labels: found)
        return found.reshape(batch["label_map"].shape)

    def _by_strips(self, model: Any, batch: Batch, told: Callable[[jax.Array, jax.Array, jax.Array], Any]) -> Any:
        """Return what ``told`` says of each strip of each image, stacked (B, strips, ...).

        The logits of a whole photograph as it is stored would be large, so images go one after another, and so do
        strips of their rows.

        Args:
            model: in evaluation mode.
            batch: for evaluation.
            told: takes logits (h, W, K), the labels found and the true ones, uint8 (h, W), of a strip.
        """
        height, width = batch["label_map"].shape[1:]
        rows = height if height % GRAIN else GRAIN
        while rows > 1 and rows * width > _AT_ONCE:
            rows //= 2

        def of_image(one: tuple[Any, ...]) -> Any:
            views, labels, original = one

            def of_strip(strip: tuple[jax.Array, jax.Array]) -> Any:
                top, labels = strip
                part = mean_logits(views, original, (rows, width), top)
                return told(part, part.argmax(-1).astype(jnp.uint8), labels)

            return jax.lax.map(of_strip, (jnp.arange(0, height, rows), labels.reshape(-1, rows, width)))

        return jax.lax.map(of_image, (self.views(model, batch), batch["label_map"], batch["original"]))

    def alone(self, reader: LabelMaps, pixels: np.ndarray) -> Example:
        """Return a picture with a label map that is ignored, whose shape is one of few."""
        example = reader.evaluate((pixels, np.full(size_of(pixels), IGNORED, np.uint8)))
        for name in [name for name in example if name.startswith("image")]:
            image = np.asarray(example[name])
            example[name] = padded(image, tuple(max(side, _LEAST) for side in size_of(image)))
        return example | {"label_map": np.full([_one_of_few(side) for side in size_of(pixels)], IGNORED, np.uint8)}

    def found(self, answers: np.ndarray, size: Size) -> np.ndarray:
        """Return the label map, uint8 (H, W), of a picture."""
        return answers[: size[0], : size[1]]

    def views(self, model: Any, batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
        """Return the logits (B, H, W, K) of every view of the images that the test asks for, and sizes (B, 2)."""
        if not self.data.test_scales:
            return [(self.logits(model, self.normalized(batch)), batch["size"])]
        found = []
        for i in range(len(self.data.test_scales)):
            size = batch[f"size_{i}"]
            images = self.normalized({"image": batch[f"image_{i}"], "size": size})
            mirrored = jax.vmap(mirror)
            found.append((self.logits(model, images), size))
            found.append((mirrored(self.logits(model, mirrored(images, size)), size), size))
        return found

    def logits(self, model: Any, images: jax.Array) -> jax.Array:
        """Return the logits (B, H, W, K) of normalised images (B, H, W, 3), by the test that the data ask for."""
        if self.data.test == "whole":
            return whole(model, images)
        return slide(model, images, window=(self.data.image_size,) * 2, stride=(self.data.test_stride,) * 2)

    def collector(self, *, pictures: bool) -> Collector | None:
        """Return what keeps the worst images."""
        return Worst() if pictures else None

    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return ``mIoU``, ``mAcc`` (means over the classes that are there), ``aAcc`` (per cent) and ``eval_loss``."""
        counts = Counts(*sums["counts"])
        overlaps, accuracies = counts.figures()
        return {
            "mIoU": float(np.nanmean(overlaps)),
            "mAcc": float(np.nanmean(accuracies)),
            "aAcc": 100
            * float(np.sum(counts.right, dtype=np.float64))
            / float(np.sum(counts.labelled, dtype=np.float64)),
            "eval_loss": float(sums["loss"]) / float(sums["examples"]),
        }

    # For the reader.

    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words."""
        words = f"mIoU {figures['mIoU']:.2f} %, pixels right {figures['aAcc']:.2f} %"
        if "ema_mIoU" in figures:
            words += f"; moving average mIoU {figures['ema_mIoU']:.2f} %, pixels right {figures['ema_aAcc']:.2f} %"
        return f"{words} ({figures['examples']:.0f} images)"

    def pictures(self, folder: Path, collector: Collector) -> None:
        """Draw label_maps.png, the worst images first."""
        assert isinstance(collector, Worst)
        draw_label_maps(folder / LABEL_MAPS, [one[2:] for one in collector.kept], self.class_names)

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write per_class.csv: pixels, IoU and accuracy of each class; empty for one that is nowhere."""
        columns: dict[str, list] = {}
        for variant, total in sums.items():
            counts, prefix = Counts(*total["counts"]), "" if variant == "model" else f"{variant}_"
            overlaps, accuracies = counts.figures()
            columns["pixels"] = [int(n) for n in counts.labelled]  # the same for every variant
            columns |= {f"{prefix}IoU": per_cent(overlaps), f"{prefix}accuracy": per_cent(accuracies)}
        write_columns(folder, self.class_names, columns)
        return [PER_CLASS]
