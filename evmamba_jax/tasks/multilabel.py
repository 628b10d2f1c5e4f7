"""Images with any number of labels each: binary cross-entropy, mean average precision, a table by class.

A table of pictures (``data.name=table``) gives the labels, several joined by ``;``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evmamba_jax.config import Config
from evmamba_jax.data import device, sources
from evmamba_jax.data.readers import MultiLabelImages, Reader
from evmamba_jax.errors import UserError
from evmamba_jax.reports import page
from evmamba_jax.reports.page import Section
from evmamba_jax.reports.per_class import PER_CLASS, write_columns
from evmamba_jax.tasks.base import Batch, Collector, Figure
from evmamba_jax.tasks.classification import Classification, binary_cross_entropy
from evmamba_jax.tasks.registry import register


class Scores(Collector):
    """The probabilities and the labels of all images."""

    def __init__(self):
        self._answers: list[Mapping[str, np.ndarray]] = []

    def add(self, rows: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray], own: slice) -> None:
        """Note a batch."""
        self._answers.append(answers)

    def average_precisions(self) -> np.ndarray:
        """Return the average precision of each class (K,); NaN for a class that no image has."""
        from sklearn.metrics import average_precision_score  # a second to import, which no other task needs

        weight, labels, scores = (
            np.concatenate([answers[name] for answers in self._answers]) for name in ("weight", "labels", "scores")
        )
        labels, scores = labels[weight > 0], scores[weight > 0]
        return np.array(
            [
                average_precision_score(labels[:, k], scores[:, k]) if labels[:, k].any() else np.nan
                for k in range(labels.shape[1])
            ]
        )


@register("multilabel")
class Multilabel(Classification):
    """Several labels an image, or none."""

    chooses = Figure("mAP", higher=True, title="mean average precision on the test images (%)")

    @classmethod
    def validate(cls, config: Config) -> None:
        """Refuse options that need exactly one class an image."""
        super().validate(config)
        for name, value, wanted in (
            ("loss.name", config.loss.name, "bce"),
            ("optim.mesa", config.optim.mesa, 0),
            ("confusion", config.confusion, False),
            ("loss.balanced", config.loss.balanced, False),
            ("data.balanced", config.data.balanced, False),
        ):
            if value != wanted:
                raise UserError(f"config.task=multilabel needs config.{name}={wanted}; it is {value}")

    # The data.

    @classmethod
    def describe(cls, config: Config) -> sources.Description:
        """Describe the user's own pictures."""
        source = cls.open_source(config, config.data.train_split)
        return sources.Description(source.class_names, len(source), source.name)

    @classmethod
    def open_source(cls, config: Config, split: str, work: Path | None = None) -> Any:
        """Open a split whose images may have several labels."""
        return sources.open_source(config.data, split, work, several=True)

    def reader(self) -> Reader:
        """Return the reader of images with labels."""
        return MultiLabelImages(self.config.data, len(self.class_names))

    # Training.

    def inputs(self, key: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Return mixed images in the compute type, and targets (B, K)."""
        return super().inputs(key, {"image": batch["image"], "label": batch["labels"]})

    # Evaluation.

    def evaluate(self, model: Any, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Return the sums of loss, and of true, found and rightly found labels by class at 0.5; and all scores."""
        data = self.config.data
        images = device.normalize(batch["image"], data.mean, data.std, dtype=self.config.model.dtype)
        logits = model(images).astype(jnp.float32)
        labels, weight = batch["labels"], batch["weight"]
        found = (logits > 0).astype(jnp.float32)
        sums = {
            "loss": binary_cross_entropy(logits, labels) @ weight,
            "true": weight @ labels,
            "found": weight @ found,
            "right": weight @ (found * labels),
        }
        return sums, {"scores": jax.nn.sigmoid(logits), "labels": labels, "weight": weight}

    def collector(self, *, pictures: bool) -> Collector:
        """Return what keeps the scores, of which average precision is no sum."""
        return Scores()

    def metrics(self, sums: Mapping[str, Any], collector: Collector | None) -> dict[str, float]:
        """Return ``mAP``, the mean over the classes that images have, ``f1`` at 0.5 (per cent), and ``eval_loss``."""
        assert isinstance(collector, Scores)
        precisions = collector.average_precisions()
        total = sums["true"].sum() + sums["found"].sum()
        return {
            "mAP": 100 * float(np.nanmean(precisions)) if np.isfinite(precisions).any() else 0.0,
            "f1": 200 * float(sums["right"].sum() / total) if total else 0.0,
            "eval_loss": float(sums["loss"]) / float(sums["examples"]),
        }

    # For the reader.

    def told(self, figures: Mapping[str, float]) -> str:
        """Return an evaluation's figures in words."""
        words = f"mAP {figures['mAP']:.2f} %, F1 {figures['f1']:.2f} %"
        if "ema_mAP" in figures:
            words += f"; moving average mAP {figures['ema_mAP']:.2f} %, F1 {figures['ema_f1']:.2f} %"
        return f"{words} ({figures['examples']:.0f} images)"

    def sections(self, collector: Collector, whose: str) -> list[Section]:
        """Return the average precision of each class."""
        assert isinstance(collector, Scores)
        precisions = zip(self.class_names, collector.average_precisions(), strict=True)
        rows = [(name, "none" if np.isnan(value) else f"{value:.1%}") for name, value in precisions]
        return [Section("Classes", page.table(("class", "average precision"), rows))]

    def pictures(self, folder: Path, collector: Collector) -> None:
        """Draw nothing."""

    def tables(
        self, folder: Path, sums: Mapping[str, Any], collectors: Mapping[str, Any], best: str, whose: str, source: Any
    ) -> list[str]:
        """Write per_class.csv: images, precision, recall and F1 at 0.5 of each class, in per cent."""
        share = lambda part, whole: f"{100 * part / whole:.2f}" if whole else ""  # noqa: E731
        of = sums[best]
        true, found, right = (list(map(int, of[name])) for name in ("true", "found", "right"))
        columns = {
            "images": true,
            "precision": [share(*pair) for pair in zip(right, found, strict=True)],
            "recall": [share(*pair) for pair in zip(right, true, strict=True)],
            "f1": [share(2 * r, t + f) for r, t, f in zip(right, true, found, strict=True)],
        }
        write_columns(folder, self.class_names, columns)
        return [PER_CLASS]
