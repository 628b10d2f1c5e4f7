"""One optimizer step of any task, the function that is compiled."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from evmamba_jax import lora
from evmamba_jax.arrays import Arrays, Variables, merge, split
from evmamba_jax.tasks import Moment, Task
from evmamba_jax.tasks.base import Batch
from evmamba_jax.training.sparse import Sparse
from evmamba_jax.training.state import TrainState
from evmamba_jax.training.tuning import freeze_modules


def make_train_step(
    task: Task,
    tx: optax.GradientTransformation,
    *,
    trained: Sequence[str],
    sparse: Sparse,
    steps_per_epoch: int,
    log_every: int,
) -> Callable[[TrainState, Batch], TrainState]:
    """Return ``train_step(state, batch) -> state``.

    A step whose loss or gradient is not finite leaves its two numbers in ``state.last`` and changes nothing else, nor
    does any step after it: the state before it is kept exactly.

    Args:
        task: gives model, inputs and loss; of its config the seed, accumulation and the moving average are read.
        tx: the optimizer of the trained parameters.
        trained: paths of the parameters that change; no activations are kept for the others.
        sparse: what is pruned.
        steps_per_epoch: turns lengths in epochs into steps.
        log_every: steps from one log line to the next.
    """
    config = task.config
    gradient = _make_gradient(task, trained, steps_per_epoch)
    moved = _make_moved_average(trained, config.optim.ema_decay, warmup=config.optim.ema_warmup)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        input_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        inputs = task.inputs(input_key, batch)
        loss, parts, grads, batch_stats = gradient(state, inputs, model_key)
        grads, extra = sparse.keep(state, grads)
        seen = {"loss": loss, "grad_norm": optax.tree.norm(grads)}

        old = {name: state.model.params[name] for name in trained}
        updates, opt_state = tx.update(grads, state.opt_state, old)
        updated: Any = optax.apply_updates(old, updates)
        model = Variables(state.model.params | updated, batch_stats)
        new = TrainState(
            model=model,
            ema=moved(state.ema, model, state.step),
            opt_state=opt_state,
            step=state.step + 1,
            window=_noted(state, seen | parts | {"corrupt": batch["corrupt"].sum(), "steps": 1}, log_every),
            last=state.last,
            extra=extra,
        )
        return _unless_not_finite(state, new, seen)

    return train_step


def _make_gradient(
    task: Task, trained: Sequence[str], steps_per_epoch: int
) -> Callable[[TrainState, Any, jax.Array], tuple]:
    """Return the function that gives the mean loss, its parts, the gradient, and the new batch statistics."""
    rounds = task.config.accumulation
    graphdef, params, batch_stats = split(task.model)
    model = merge(graphdef, params, batch_stats)
    model.train()
    freeze_modules(model, {name.removesuffix(".lora_a") for name in trained})
    graphdef = split(model).graphdef

    def loss_of_round(
        changing: Arrays, params: Arrays, batch_stats: Arrays, inputs: Any, key: jax.Array, moment: Moment
    ):
        model = merge(graphdef, lora.merged(params | changing), batch_stats)
        loss, parts = task.loss(model, inputs, key, moment)
        return loss, (parts, split(model).batch_stats)

    def gradient(state: TrainState, inputs: Any, key: jax.Array) -> tuple:
        moment = Moment(state.step, steps_per_epoch, _averaged(graphdef, state.ema))

        def one_round(carry, round_inputs):
            (loss_sum, part_sums), grad_sum, batch_stats = carry
            index, inputs = round_inputs
            (loss, (parts, batch_stats)), grads = jax.value_and_grad(loss_of_round, has_aux=True)(
                changing, state.model.params, batch_stats, inputs, jax.random.fold_in(key, index), moment
            )
            sums = loss_sum + loss, jax.tree.map(jnp.add, part_sums, parts)
            return (sums, jax.tree.map(jnp.add, grad_sum, grads), batch_stats), None

        changing = {name: state.model.params[name] for name in trained}
        no_loss = jnp.zeros(()), {name: jnp.zeros(()) for name in task.parts}
        zeros = no_loss, jax.tree.map(jnp.zeros_like, changing), state.model.batch_stats
        if rounds == 1:  # on a CPU, convolutions within a loop take up to eight times as long
            (losses, grads, batch_stats), _ = one_round(zeros, (0, inputs))
        else:
            # Every device splits its own rows, so no image moves.
            rows = jax.tree.map(lambda array: rearrange(array, "(b r) ... -> r b ...", r=rounds), inputs)
            (losses, grads, batch_stats), _ = jax.lax.scan(one_round, zeros, (jnp.arange(rounds), rows))
        loss, parts, grads = jax.tree.map(lambda total: total / rounds, (*losses, grads))
        return loss, parts, grads, batch_stats

    return gradient


def _averaged(graphdef: Any, ema: Variables | None) -> Callable[[], Any] | None:
    """Return what builds the averaged model; a loss builds it where it needs it, as traced functions must."""
    if ema is None:
        return None

    def averaged() -> Any:
        model = merge(graphdef, lora.merged(ema.params), ema.batch_stats)
        model.eval()
        return model

    return averaged


def _make_moved_average(
    trained: Sequence[str], decay: float, *, warmup: bool
) -> Callable[[Variables | None, Variables, jax.Array], Variables | None]:
    """Return what moves the average of all that changes towards the model after update ``step``."""

    def moved(ema: Variables | None, model: Variables, step: jax.Array) -> Variables | None:
        if ema is None:
            return None
        updates = (step + 1).astype(jnp.float32)
        kept = jnp.minimum(decay, (1 + updates) / (10 + updates)) if warmup else decay
        mix = lambda old, now: kept * old + (1 - kept) * now  # noqa: E731
        params = {name: mix(ema.params[name], model.params[name]) for name in trained}
        return Variables(ema.params | params, jax.tree.map(mix, ema.batch_stats, model.batch_stats))

    return moved


def _noted(state: TrainState, numbers: dict[str, Any], log_every: int) -> dict[str, jax.Array]:
    """Return the sums since the last log line with this step's numbers added."""
    opening = state.step % log_every == 0
    return {name: jnp.where(opening, 0, state.window[name]) + jnp.float32(value) for name, value in numbers.items()}


def _unless_not_finite(old: TrainState, new: TrainState, seen: dict[str, jax.Array]) -> TrainState:
    """Return the new state if all that was seen is finite, now and before; else the old one with what is not."""
    going = _is_finite(old.last)
    select = lambda condition, a, b: jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)  # noqa: E731
    return dataclasses.replace(select(going & _is_finite(seen), new, old), last=select(going, seen, old.last))


def _is_finite(numbers: dict[str, jax.Array]) -> jax.Array:
    return jnp.isfinite(jnp.stack(list(numbers.values()))).all()
