"""The two functions that are compiled: one optimizer step and one evaluation batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from evmamba_jax.arrays import merge, split
from evmamba_jax.data import device
from evmamba_jax.training.config import Config
from evmamba_jax.training.state import TrainState, Variables

Batch = dict[str, jax.Array]


def is_finite(numbers: dict[str, jax.Array]) -> jax.Array:
    """Return whether all of a dictionary of scalars are finite."""
    return jnp.isfinite(jnp.stack(list(numbers.values()))).all()


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Soft-target cross-entropy of each example: logits and targets (B, classes) -> (B,), float32 or wider."""
    return optax.losses.softmax_cross_entropy(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), targets)


def mesa_divergence(logits: jax.Array, averaged: jax.Array) -> jax.Array:
    """How far the prediction is from the averaged model's: logits (B, classes), both -> scalar float32.

    50 times the mean Kullback-Leibler divergence of softmax(logits / 3) from softmax(averaged / 3).

    Source: MESA (arXiv:2205.14083) as MambaVision's trainer has it.
    """
    student, teacher = (jax.nn.log_softmax(x.astype(jnp.float32) / 3) for x in (logits, averaged))
    return 50 * optax.losses.kl_divergence_with_log_targets(student, teacher).mean()


def make_train_step(
    graphdef: Any,
    tx: optax.GradientTransformation,
    config: Config,
    *,
    num_classes: int,
    log_every: int,
    mesa_start: int = 0,
) -> Callable[[TrainState, Batch], TrainState]:
    """Return ``train_step(state, batch) -> state``.

    ``state.window`` sums loss, gradient norm and passed-over records since the last log line; it belongs
    to the state so that a resumed run logs the same numbers. A step whose loss or gradient is not finite leaves its
    two numbers in ``last`` and changes nothing else, nor does any step after it: the state before it is kept exactly.

    Args:
        graphdef: of the model, in training mode.
        tx: the optimizer.
        config: reads data, model.dtype, seed, accumulation, and of optim the moving average and MESA.
        num_classes: K.
        log_every: steps from one log line to the next.
        mesa_start: the first step with MESA's term in the loss, where there is one.
    """
    mesa = config.optim.mesa

    def loss_fn(params, batch_stats, images, targets, key, averaged):
        model = merge(graphdef, params, batch_stats)
        logits = model(images, key=key)
        loss = cross_entropy(logits, targets).mean()
        if averaged is not None:
            weight, averaged_logits = averaged
            loss += weight * mesa_divergence(logits, averaged_logits)
        return loss, split(model).batch_stats

    def of_averaged(state, images):
        """Return the weight of MESA's term and what the averaged model makes of the images, or None without MESA."""
        if not mesa:
            return None
        begun = state.step >= mesa_start

        def predict():
            model = merge(graphdef, **state.ema.asdict())
            model.eval()
            return model(images)

        unused = jnp.zeros((len(images), num_classes), jax.eval_shape(predict).dtype)
        return jnp.where(begun, mesa, 0.0), jax.lax.cond(begun, predict, lambda: unused)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(state, images, targets, key):
        """Mean loss and gradient over the rounds of accumulation; batch statistics follow round by round."""
        model, rounds = state.model, config.accumulation
        # Every device splits its own rows, so no image moves.
        rows = rearrange(images, "(b r) ... -> r b ...", r=rounds), rearrange(targets, "(b r) c -> r b c", r=rounds)

        def one_round(carry, inputs):
            loss_sum, grad_sum, batch_stats = carry
            index, images, targets = inputs
            (loss, batch_stats), grads = grad_fn(
                model.params,
                batch_stats,
                images,
                targets,
                jax.random.fold_in(key, index),
                of_averaged(state, images),
            )
            return (loss_sum + loss, jax.tree.map(jnp.add, grad_sum, grads), batch_stats), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, model.params), model.batch_stats
        (loss, grads, batch_stats), _ = jax.lax.scan(one_round, zeros, (jnp.arange(rounds), *rows))
        return loss / rounds, jax.tree.map(lambda g: g / rounds, grads), batch_stats

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        augment_key, drop_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        images, targets = device.train_augment(
            augment_key, batch["image"], batch["label"], config.data, num_classes=num_classes
        )
        images = images.astype(config.model.dtype)
        loss, grads, batch_stats = accumulated(state, images, targets, drop_key)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.model.params)

        params: Any = optax.apply_updates(state.model.params, updates)
        model, ema = Variables(params, batch_stats), state.ema
        if ema is not None:
            decay = config.optim.ema_decay
            ema = jax.tree.map(lambda old, now: decay * old + (1 - decay) * now, ema, model)
        seen = {"loss": loss, "grad_norm": grad_norm}
        total = seen | {"corrupt": batch["corrupt"].sum(), "steps": 1}
        opening = state.step % log_every == 0
        window = {name: jnp.where(opening, 0, state.window[name]) + jnp.float32(value) for name, value in total.items()}
        new = TrainState(model, ema, opt_state, state.step + 1, window, state.last, state.extra)

        going = is_finite(state.last)
        select = lambda condition, a, b: jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)  # noqa: E731
        return dataclasses.replace(select(going & is_finite(seen), new, state), last=select(going, seen, state.last))

    return train_step


def make_eval_step(graphdef: Any, config: Config) -> Callable[[Variables, Batch], tuple[dict, dict]]:
    """Return ``eval_step(variables, batch) -> (sums, answers)`` for a model in evaluation mode.

    ``sums``: loss, top1, top5 (weighted), weight and corrupt, each a scalar; ``answers``: the predicted class, its
    probability and the true class's rank (0 is the first), each (B,).
    """

    def eval_step(variables: Variables, batch: Batch) -> tuple[dict, dict]:
        images = device.normalize(batch["image"], config.data.mean, config.data.std, dtype=config.model.dtype)
        model = merge(graphdef, **variables.asdict())
        logits = model(images).astype(jnp.float32)
        labels, weight = batch["label"], batch["weight"]
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)
        # The number of classes that score higher; on a tie the lower index wins, as argmax has it. NaN, which no
        # comparison holds for, scores higher than everything: a model that gives it is never right.
        lower = jnp.arange(logits.shape[1]) < labels[:, None]
        rank = (~(logits <= own) | ((logits == own) & lower)).sum(1)
        sums = {
            "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels) @ weight,
            "top1": (rank < 1) @ weight,
            "top5": (rank < 5) @ weight,
            "weight": weight.sum(),
            "corrupt": batch["corrupt"].sum().astype(jnp.float32),
        }
        answers = {"prediction": logits.argmax(1), "probability": jax.nn.softmax(logits).max(1), "rank": rank}
        return sums, answers

    return eval_step
