"""Evaluations of any task: every example exactly once, by the parameters and by their moving average."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from evmamba_jax import lora
from evmamba_jax.arrays import Variables, merge, split
from evmamba_jax.data import loader
from evmamba_jax.errors import UserError
from evmamba_jax.tasks import Collector, Task
from evmamba_jax.tasks.base import Batch
from evmamba_jax.training import mesh as meshes
from evmamba_jax.weights import average_is_better


class Evaluation(NamedTuple):
    """What an evaluation found.

    Attributes:
        figures: the task's metrics by name; metrics of the moving average begin with ``ema_``.
        sums: the task's sums, of ``model`` and, where there is one, ``ema``.
        best: "ema" where the moving average was found better, else "model".
        collectors: of ``model`` and, where there is one, ``ema``; None where the task has none.
    """

    figures: dict[str, float]
    sums: dict[str, dict[str, Any]]
    best: str
    collectors: dict[str, Collector | None]

    @property
    def collector(self) -> Collector | None:
        """Of the best."""
        return self.collectors[self.best]


class Evaluator:
    """Evaluates weights of a task's model on the examples of a source, on a mesh.

    Args:
        task: gives sums and metrics.
        mesh: of this run's devices.
        source: the evaluation split.
    """

    def __init__(self, task: Task, mesh: Mesh, source: Any):
        self.task = task
        self.mesh = mesh
        self.source = source
        task.see_evaluated(source)
        self._reader = task.reader()
        self._graphdef = split(task.model).graphdef
        whole = meshes.replicated(mesh)
        self._step = jax.jit(self._one_batch, static_argnames="detailed", out_shardings=whole)
        self._add = jax.jit(functools.partial(jax.tree.map, jnp.add), donate_argnums=0, out_shardings=whole)

    def _one_batch(self, variables: Variables, batch: Batch, *, detailed: bool) -> tuple[dict[str, Any], Any]:
        model = merge(self._graphdef, lora.merged(variables.params), variables.batch_stats)
        sums, answers = self.task.evaluate(model, batch, detailed=detailed)
        counts = {"examples": batch["weight"].sum(), "corrupt": batch["corrupt"].sum().astype(jnp.float32)}
        return sums | counts, answers

    def __call__(
        self,
        model: Variables,
        ema: Variables | None,
        *,
        detailed: bool = False,
        pictures: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> Evaluation:
        """Evaluate a model and, where there is one, its moving average.

        Args:
            model: its arrays.
            ema: the arrays of the average.
            detailed: sum what the task's tables need.
            pictures: collect what the task's pictures need.
            check: is called before each batch; what it raises ends the evaluation.

        Raises:
            UserError: not one example can be read.
        """
        variants = {"model": model} | ({} if ema is None else {"ema": ema})
        collectors = {name: self.task.collector(pictures=pictures) for name in variants}
        totals: dict[str, Any] = {}
        with self._batches() as batches:
            for rows in batches:
                check()
                batch = global_batch(self.mesh, rows)
                for name, variables in variants.items():
                    with jax.set_mesh(self.mesh):  # kernels find their shards by it
                        sums, answers = self._step(variables, batch, detailed=detailed)
                    totals[name] = self._add(totals[name], sums) if name in totals else sums
                    collector = collectors[name]
                    if collector is not None:
                        count, process = len(rows["weight"]), jax.process_index()
                        collector.add(rows, jax.device_get(answers), slice(process * count, (process + 1) * count))
        sums = {name: jax.device_get(total) for name, total in totals.items()}
        figures, chooses = self._figures(sums, collectors), self.task.chooses
        best = "ema" if average_is_better(figures, chooses.name, chooses.higher) else "model"
        return Evaluation(figures, sums, best, collectors)

    def weights(self, place: str | os.PathLike[str]) -> tuple[tuple[Any, Any], str]:
        """Return the parameters of a place and their moving average, or None, on all devices; and the place in words.

        Raises:
            UserError: nothing is there, or it does not fit.
        """
        weights = self.task.load(place, ema=False)
        both, taken = (weights.variables, None), weights.taken
        if weights.meta.get("ema"):
            both = weights.variables, self.task.load(place, ema=True).variables
            taken = f"{weights.place}, parameters and moving average"
        return jax.device_put(both, meshes.replicated(self.mesh)), taken

    def _batches(self) -> loader.Batches:
        return loader.eval_batches(
            self.task.config.data,
            self.source,
            global_batch=self.task.eval_batch(self.mesh.size),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            reader=self._reader,
        )

    def _figures(
        self, sums: Mapping[str, dict[str, Any]], collectors: Mapping[str, Collector | None]
    ) -> dict[str, float]:
        examples, corrupt = float(sums["model"]["examples"]), float(sums["model"]["corrupt"])
        if not examples:
            raise UserError(
                f"not one of the {len(self.source)} images of {self.source.name}, split {self.source.split}, can be "
                "read; prepare the data set again"
            )
        figures = {}
        for variant, total in sums.items():
            prefix = "" if variant == "model" else f"{variant}_"
            metrics = self.task.metrics(total, collectors[variant])
            figures |= {prefix + name: value for name, value in metrics.items()}
        figures["examples"] = examples
        if self.task.config.data.on_corrupt == "skip":
            figures["eval_corrupt"] = corrupt
        return figures


def global_batch(mesh: Mesh, rows: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Make this process's rows part of a batch that lies over all devices."""
    sharding = meshes.batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}
