"""Where every array of the train state lies, and the train step over them, lowered from shapes alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from evmamba_jax.arrays import Arrays, merge, split
from evmamba_jax.errors import UserError
from evmamba_jax.training import mesh as meshes
from evmamba_jax.training import optimizer
from evmamba_jax.training.config import Duration
from evmamba_jax.training.state import TrainState, Variables, init_state
from evmamba_jax.training.step import Batch, make_train_step
from evmamba_jax.training.task import Plan


class Layout:
    """The train state's structure, where each of its arrays lies, and the step over it.

    Args:
        plan: the model, on a mesh.
        examples: length of the training split, from which lengths in epochs become steps.

    Raises:
        UserError: a schedule that cannot be.
    """

    def __init__(self, plan: Plan, examples: int):
        config = plan.config
        self.plan = plan
        self.steps_per_epoch = max(1, examples // config.batch_size)  # whole batches
        self.total_steps, self.log_every = map(self.in_steps, (config.duration, config.log_every))
        self.mesa_start = config.optim.mesa_start.in_steps(self.steps_per_epoch)
        if config.optim.mesa and self.mesa_start >= self.total_steps:
            raise UserError(
                f"config.optim.mesa_start is {self.mesa_start} steps and the whole run {self.total_steps}: let MESA "
                "begin earlier, or turn it off with --config.optim.mesa=0"
            )
        self.schedule = optimizer.learning_rate(
            config.optim, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        self.tx = optimizer.make_optimizer(config.optim, self.schedule)
        _, *arrays = plan.abstract
        shapes = jax.eval_shape(self.init, *arrays)
        self.shardings = meshes.state_shardings(plan.mesh, shapes)
        self.abstract_state: TrainState = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes, self.shardings
        )

    def in_steps(self, length: Duration) -> int:
        """Return a length of training in steps, at least one."""
        return max(1, length.in_steps(self.steps_per_epoch))

    def init(self, params: Arrays, batch_stats: Arrays) -> TrainState:
        """Return the state before the first step of a model."""
        return init_state(Variables(params, batch_stats), self.tx, ema=self.plan.config.optim.ema_decay > 0)

    def fresh(self) -> TrainState:
        """Return the state of step 0: initial values, or those of ``init_from``."""
        source = self.plan.config.init_from
        if source:
            weights = self.plan.load(source)
            if jax.process_index() == 0:
                print(f"weights: {weights.taken}")
            return jax.jit(self.init, out_shardings=self.shardings)(weights.params, weights.batch_stats)
        return jax.jit(lambda: self.init(*split(self.plan.build_model())[1:]), out_shardings=self.shardings)()

    def step(self) -> tuple[Callable[[TrainState, Batch], TrainState], tuple[TrainState, Batch]]:
        """Return the train step and its abstract arguments, each with its place on the plan's mesh."""
        config = self.plan.config
        graphdef, params, batch_stats = self.plan.abstract
        model = merge(graphdef, params, batch_stats)
        model.train()
        step = make_train_step(
            split(model).graphdef,
            self.tx,
            config,
            num_classes=self.plan.num_classes,
            log_every=self.log_every,
            mesa_start=self.mesa_start,
        )
        side, channels = config.data.image_size, config.data.in_channels
        kinds = {"image": ((side, side, channels), jnp.uint8), "label": ((), jnp.int32), "corrupt": ((), jnp.int32)}
        sharding = meshes.batch_sharding(self.plan.mesh)
        batch: Any = {
            name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in kinds.items()
        }
        return step, (self.abstract_state, batch)

    def lower(self) -> jax.stages.Lowered:
        """Return the step, traced and lowered for the plan's mesh."""
        step, arguments = self.step()
        # The ambient mesh tells kernels how their arguments are sharded and which kind of device they are lowered for.
        with jax.set_mesh(self.plan.mesh):
            return jax.jit(step, out_shardings=self.shardings, donate_argnums=0).lower(*arguments)
