"""A model, the mesh it lies on and the data it is evaluated on: what training and evaluation share."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from evmamba_jax import __version__
from evmamba_jax.arrays import merge, split
from evmamba_jax.data import loader
from evmamba_jax.data.sources import open_source
from evmamba_jax.errors import UserError
from evmamba_jax.models import abstract_model, build_model
from evmamba_jax.reports.predictions import predictions
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training.config import Config
from evmamba_jax.training.state import Variables
from evmamba_jax.training.step import make_eval_step
from evmamba_jax.training.tally import Tally
from evmamba_jax.weights import Weights, load_weights

PICTURED = 64  # examples in predictions.png


class Plan:
    """A model and the mesh it lies on, settled from shapes alone: nothing is read, placed or computed.

    Raises:
        UserError: a model or image size that cannot be.
    """

    def __init__(self, config: Config, mesh: Mesh, num_classes: int):
        self.config = config
        self.mesh = mesh
        self.num_classes = num_classes
        self.model = abstract_model(config.model.name, **self._model_options())
        self.abstract = split(self.model)
        # Traced once for its errors: an image size that the model cannot take is found before anything is compiled.
        side, channels = config.data.image_size, config.data.in_channels
        image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        graphdef, *arrays = self.abstract
        jax.eval_shape(lambda arrays, image: merge(graphdef, *arrays)(image), arrays, image)

    def build_model(self) -> nnx.Module:
        """Return the model with fresh initial values."""
        return build_model(self.config.model.name, rngs=nnx.Rngs(self.config.seed), **self._model_options())

    def _model_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "num_classes": self.num_classes,
            "in_channels": config.data.in_channels,
            "drop_path_rate": config.model.drop_path_rate,
            "dtype": config.model.dtype,
            **config.model.options,
        }

    def load(self, source: str | os.PathLike[str], *, ema: bool | Literal["better"] = "better") -> Weights:
        """Return the weights of a place as the model takes them; see :func:`load_weights`.

        Every process of the run reads for itself. Only training goes on from weights of another grid of patches, or for
        another number of classes, in place of whose head it takes the initial one.
        """
        name = f"{self.config.model.name} for {self.config.data.name}"
        initial = None if self.config.eval_only else self.build_model
        return load_weights(self.model, source, name, ema=ema, initial=initial)


class Task(Plan):
    """A plan for the devices of this run, with the evaluation split open.

    Raises:
        UserError: data, model, mesh or image size that cannot be.
    """

    def __init__(self, config: Config):
        mesh = meshes.make_mesh(config)
        self.is_main = jax.process_index() == 0
        self.eval_source = open_source(config.data, config.data.eval_split)
        super().__init__(config, mesh, self.eval_source.num_classes)
        self.eval_step = jax.jit(make_eval_step(self.abstract.graphdef, config), out_shardings=meshes.replicated(mesh))

    def global_batch(self, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Make this process's rows part of a batch that lies over all devices."""
        sharding = meshes.batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}

    def meta(self, step: int, figures: dict[str, float], evaluated: int | None) -> dict[str, Any]:
        """Return what a checkpoint says about itself."""
        config = self.config
        return {
            "model": config.model.name,
            "num_classes": self.num_classes,
            "class_names": self.eval_source.class_names,
            "step": step,
            "figures": figures,
            "evaluated": evaluated,
            "chooses": {"figure": "top1", "higher": True},  # between parameters and moving average
            "ema": config.optim.ema_decay > 0,
            "config": dataclasses.asdict(config),
            "versions": {"evmamba-jax": __version__, "jax": jax.__version__, "flax": flax.__version__},
        }

    def evaluate(
        self,
        model: Variables,
        ema: Variables | None,
        *,
        pictures_in: Path | None = None,
        tally: Tally | None = None,
    ) -> dict[str, float]:
        """Evaluate a model and, where there is one, its moving average on every example exactly once.

        Args:
            model: its arrays.
            ema: the same of the average.
            pictures_in: folder for predictions.png (of the moving average where there is one).
            tally: counts the answers by class.

        Returns:
            ``top1``, ``top5`` (per cent) and ``eval_loss``, the same with ``ema_``, and ``examples``.
        """
        config = self.config
        variants = {"model": model} | ({} if ema is None else {"ema": ema})
        totals: dict[str, dict[str, jax.Array]] = {}
        gallery = _Gallery() if pictures_in and self.is_main else None
        batches = loader.eval_batches(
            config.data,
            self.eval_source,
            global_batch=config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with batches:
            for rows in batches:
                batch = self.global_batch({k: rows[k] for k in ("image", "label", "weight", "corrupt")})
                answers = {}
                for name, variables in variants.items():
                    with jax.set_mesh(self.mesh):  # kernels find their shards by it
                        sums, answers = self.eval_step(variables, batch)
                    totals[name] = jax.tree.map(jnp.add, totals[name], sums) if name in totals else sums
                    if tally:
                        tally.add(name, batch, answers)
                if gallery:
                    gallery.add(rows, jax.device_get(answers))
        if gallery and pictures_in:
            gallery.draw(pictures_in, self.eval_source.class_names)

        figures = {}
        sums = jax.device_get(totals)
        for name in variants:
            prefix = "" if name == "model" else f"{name}_"
            total = {key: float(value) for key, value in sums[name].items()}
            if not total["weight"]:
                raise UserError(
                    f"not one of the {len(self.eval_source)} images of {self.eval_source.name}, split "
                    f"{self.eval_source.split}, can be read; prepare the data set again"
                )
            figures[f"{prefix}top1"] = 100 * total["top1"] / total["weight"]
            figures[f"{prefix}top5"] = 100 * total["top5"] / total["weight"]
            figures[f"{prefix}eval_loss"] = total["loss"] / total["weight"]
        figures["examples"] = float(sums["model"]["weight"])
        if config.data.on_corrupt == "skip":
            figures["eval_corrupt"] = float(sums["model"]["corrupt"])
        return figures


class _Gallery:
    """Collects examples for predictions.png: wrong ones first, then right ones."""

    def __init__(self):
        self.wrong: list[tuple] = []
        self.right: list[tuple] = []

    def add(self, rows: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray]) -> None:
        """Note the examples of a batch; this process's rows come first in the answers to the global one."""
        count = len(rows["label"])
        columns = [rows[k] for k in ("image", "label", "weight")]
        columns += [answers[k][:count] for k in ("prediction", "probability")]
        for image, label, weight, prediction, probability in zip(*columns, strict=True):
            kept = self.right if prediction == label else self.wrong
            if weight and len(kept) < PICTURED:
                kept.append((image, label, prediction, probability))

    def draw(self, folder: Path, class_names: tuple[str, ...]) -> None:
        """Draw the picture."""
        chosen = (self.wrong + self.right)[:PICTURED]
        images, labels, predicted, probabilities = (np.stack(column) for column in zip(*chosen, strict=True))
        predictions(folder, images, labels, predicted, probabilities, class_names)


def told(figures: Mapping[str, float]) -> str:
    """Return an evaluation's figures in words."""
    words = f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %"
    if "ema_top1" in figures:
        words += f"; moving average top-1 {figures['ema_top1']:.2f} %, top-5 {figures['ema_top5']:.2f} %"
    return f"{words} ({figures['examples']:.0f} images)"
