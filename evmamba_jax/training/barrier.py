"""How far the loss rises on the straight line between two solutions of a run."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from evmamba_jax.arrays import Arrays, Variables, merge, split
from evmamba_jax.layers.norm import BatchNorm
from evmamba_jax.pruning.tickets import barrier
from evmamba_jax.tasks import Moment
from evmamba_jax.tasks.base import Batch
from evmamba_jax.training.evaluator import Evaluator, global_batch
from evmamba_jax.training.setup import Setup

LOSS = "eval_loss"  # of an evaluation's figures
POINTS = 11  # on the line, both ends with it
BATCHES = 20  # of training images, from which statistics are estimated


class Line:
    """Measures barriers by the evaluation's loss.

    Statistics of batch normalisation mean nothing between two models: each point gets its own, means over the first
    batches of the training split.

    Args:
        evaluator: of the evaluation split.
        setup: of the run.
        source: the training split.

    Source: Frankle et al., Linear mode connectivity (arXiv:1912.05671); the statistics by Jordan et al., REPAIR
    (arXiv:2211.08403).
    """

    def __init__(self, evaluator: Evaluator, setup: Setup, source: Any):
        self._evaluator, self._setup, self._source = evaluator, setup, source
        graphdef, params, statistics = split(evaluator.task.model)
        model = merge(graphdef, params, statistics)
        model.train()
        for _, module in nnx.iter_modules(model):
            if isinstance(module, BatchNorm):
                module.momentum = 0.0  # what is left is the last batch's
        self._training = split(model).graphdef
        self._between = jax.jit(lambda share, a, b: jax.tree.map(lambda x, y: (1 - share) * x + share * y, a, b))
        self._seen = jax.jit(self._statistics_of)

    def barrier(self, a: Variables, b: Variables) -> float:
        """Return the barrier between two models; NaN where the task's evaluation has no loss."""
        shares = np.linspace(0, 1, POINTS)
        return barrier(shares, [self._loss(self._between(np.float32(share), a, b)) for share in shares])

    def _loss(self, model: Variables) -> float:
        settled = Variables(model.params, self._statistics(model))
        return self._evaluator(settled, None).figures.get(LOSS, float("nan"))

    def _statistics(self, model: Variables) -> Arrays:
        if not model.batch_stats:
            return model.batch_stats
        batches = self._setup.batches(self._source, 0)
        try:
            seen = [
                self._seen(model, global_batch(self._setup.mesh, rows), step)
                for step, rows in enumerate(itertools.islice(batches, BATCHES))
            ]
        finally:
            batches.close()
        return jax.tree.map(lambda *all: jnp.mean(jnp.stack(all), axis=0), *seen)

    def _statistics_of(self, model: Variables, batch: Batch, step: jax.Array) -> Arrays:
        task = self._evaluator.task
        key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(task.config.seed), step))
        network = merge(self._training, model.params, model.batch_stats)
        task.loss(network, task.inputs(key, batch), model_key, Moment(step, self._setup.steps_per_epoch, None))
        return split(network).batch_stats
