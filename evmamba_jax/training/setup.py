"""A training run settled from shapes alone: where every array of its state lies, and the exact step, lowered."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from evmamba_jax.arrays import Variables, split
from evmamba_jax.config import Duration
from evmamba_jax.data import loader
from evmamba_jax.tasks import Task
from evmamba_jax.tasks.base import Batch
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training import optimizer, tuning
from evmamba_jax.training.sparse import Sparse
from evmamba_jax.training.state import TrainState, init_state
from evmamba_jax.training.step import make_train_step


class Setup:
    """The state's structure, its place on a mesh, and the step over it. Nothing is read, placed or computed.

    Args:
        task: gives the model and the loss.
        mesh: of devices that may be only described.
        examples: length of the training split, from which lengths in epochs become steps.

    Attributes:
        steps_per_epoch: whole batches in the training split.
        total_steps: updates in the run.
        log_every: updates from one log line to the next.
        schedule: the learning rate by step.
        tuning: what of the model is trained.
        sparse: what of it is pruned, and when.
        tx: the optimizer, of the parameters that are trained.
        shardings: of the state.
        abstract_state: the state, with ``jax.ShapeDtypeStruct`` for every array.

    Raises:
        UserError: a schedule that cannot be; patterns that are the paths of nothing.
    """

    def __init__(self, task: Task, mesh: Mesh, examples: int):
        config = task.config
        self.task = task
        self.mesh = mesh
        self.steps_per_epoch = max(1, examples // config.batch_size)
        self.total_steps, self.log_every = map(self.in_steps, (config.duration, config.log_every))
        lengths = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        task.check_lengths(**lengths)
        self.schedule = optimizer.learning_rate(config.optim, **lengths)
        _, params, batch_stats = split(task.model)
        model = jax.eval_shape(self._prepared, Variables(params, batch_stats))
        self.tuning = tuning.tuning(config.tune, model.params, head=task.head)
        self.sparse = Sparse(
            config, self.tuning.trained, model.params, task.model, in_steps=self.in_steps, total_steps=self.total_steps
        )
        scaled = any(scale != 1 for scale in self.tuning.scales.values())
        self.tx = optimizer.make_optimizer(
            config.optim,
            self.schedule,
            self.tuning.scales if scaled else None,
            decayed=optimizer.decayed_by(config.optim, task.model),
        )
        self._programs: dict[Any, jax.stages.Compiled] = {}
        shapes = jax.eval_shape(self._first, model)
        self.shardings: TrainState = meshes.state_shardings(mesh, shapes)
        self.abstract_state: TrainState = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, self.shardings
        )

    def in_steps(self, length: Duration) -> int:
        """Return a length of training in steps, at least one."""
        return max(1, length.in_steps(self.steps_per_epoch))

    def _prepared(self, model: Variables) -> Variables:
        config = self.task.config
        params = tuning.prepare(config.tune, model.params, head=self.task.head, seed=config.seed)
        return Variables(dict(params), model.batch_stats)

    def _first(self, model: Variables) -> TrainState:
        return init_state(
            model,
            self.tx.init(self.tuning.of(model.params)),
            ema=self.task.config.optim.ema_decay > 0,
            parts=self.task.parts,
            extra=self.task.extra(model) | self.sparse.first(model.params),
        )

    def first_state(self) -> TrainState:
        """Return the state of step 0: initial values, or the weights of ``init_from``."""
        place = self.task.config.init_from
        if self.tuning.told and jax.process_index() == 0:
            print(self.tuning.told)
        if place:
            weights = self.task.load(place)
            if jax.process_index() == 0:
                print(f"weights: {weights.taken}")
            return jax.jit(self._first, out_shardings=self.shardings)(self._prepared(weights.variables))
        # Every process draws the same numbers, with NumPy; compiling that takes longer than the step's compilation.
        drawn = jax.device_get(Variables(*split(self.task.build_model())[1:]))
        return jax.jit(self._first, out_shardings=self.shardings)(self._prepared(drawn))

    def step(
        self, example: Mapping[str, Any] | None = None
    ) -> tuple[Callable[[TrainState, Batch], TrainState], tuple[Any, Any]]:
        """Return the train step and its abstract arguments, each with its place on the mesh.

        Args:
            example: of the shapes of a batch's rows; None for those that most batches have.
        """
        step = make_train_step(
            self.task,
            self.tx,
            trained=self.tuning.trained,
            sparse=self.sparse,
            steps_per_epoch=self.steps_per_epoch,
            log_every=self.log_every,
        )
        size, sharding = self.task.config.batch_size, meshes.batch_sharding(self.mesh)
        # The loader adds to each example how many unreadable records it passed over.
        rows = example or (self.task.reader().blank(training=True) | {"corrupt": np.int32(0)})
        batch = {
            name: jax.ShapeDtypeStruct((size, *array.shape), array.dtype, sharding=sharding)
            for name, array in rows.items()
        }
        return step, (self.abstract_state, batch)

    def batches(self, source: Any, start: int) -> loader.Batches:
        """Return this process's rows of the training batches from a step on, without end."""
        config = self.task.config
        return loader.train_batches(
            config.data,
            source,
            seed=config.seed,
            global_batch=config.batch_size,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            reader=self.task.reader(),
        )

    def drawing(self) -> Callable[[TrainState, jax.Array], TrainState]:
        """Return what draws masks: the state, and how many zeros there are to be, to the state with new ones."""
        return jax.jit(self.sparse.draw, out_shardings=self.shardings, donate_argnums=0)

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        """The step, compiled once for all runs that take it; for batches of the shapes that most have."""
        return self.lower().compile()

    def program(self, batch: Batch) -> jax.stages.Compiled:
        """Return the step for a batch, compiled where its shapes are new."""
        rows = {name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for name, array in batch.items()}
        shapes = tuple(sorted((name, row.shape) for name, row in rows.items()))
        if shapes not in self._programs:
            usual = {name: array.shape[1:] for name, array in self.compiled.in_avals[0][1].items()}
            self._programs[shapes] = self.compiled if dict(shapes) == usual else self.lower(rows).compile()
        return self._programs[shapes]

    def lower(self, example: Mapping[str, Any] | None = None) -> jax.stages.Lowered:
        """Return the step, traced and lowered for the mesh; the argument is that of :meth:`step`."""
        step, arguments = self.step(example)
        # The ambient mesh tells kernels how their arguments are sharded and which kind of device they are lowered for.
        with jax.set_mesh(self.mesh):
            return jax.jit(step, out_shardings=self.shardings, donate_argnums=0).lower(*arguments)
