"""AdamW and LAMB with the official rules for weight decay, and the official schedules."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from evmamba_jax.config import OptimConfig
from evmamba_jax.errors import UserError
from evmamba_jax.weights.convert import table

# The official trainers spare 1-D tensors and names ending in ".bias". That leaves A_log and the stacked dt biases
# decayed although their code marks them otherwise; D is 1-D there and a matrix here. S4 and S5 spare what their systems
# and time steps are made of.
_NOT_DECAYED = (
    *("bias", "scale", "D", "gamma", "gamma_1", "gamma_2", "score", "query"),
    *("log_dt", "log_A_real", "A_imag", "Lambda_re", "Lambda_im", "log_step"),
)
# Vim also spares these two by their whole names, which those of a segmenter's backbone are not.
_NOT_DECAYED_WHOLE = ("pos_embed", "cls_token")

_DROP = 0.1  # factor of the learning rate at a milestone

Mask = Callable[[Mapping[str, Any]], dict[str, bool]]


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Return for every parameter path whether weight decay touches it where it spares "vectors"."""

    def decayed(name: str) -> bool:
        leaf = name.rsplit(".", 1)[-1].removeprefix("backward_")
        if leaf in _NOT_DECAYED or name in _NOT_DECAYED_WHOLE:
            return False
        # The dt bias of a scan with a single set of parameters is 1-D in the official code, and a matrix here.
        return not (leaf == "dt_bias" and params[name].shape[0] == 1)

    return {name: decayed(name) for name in params}


def decayed_by(config: OptimConfig, model: Any) -> Mask:
    """Return the function from parameters by path to whether weight decay touches each, by ``config.no_decay``.

    Args:
        config: says what is spared.
        model: the parameters' module, which may be abstract. "norm_names" asks for its official names; a parameter that
            the official model does not have, such as LoRA's, goes by our name.

    Raises:
        UserError: "norm_names" for a model that has no official names.

    Source: mmengine's ``DefaultOptimWrapperConstructor`` with ``custom_keys={"norm": dict(decay_mult=0.0)}``, as the
    files of VMamba, MSVMamba and MambaVision have it; the position tables that some of them name too are Swin's.
    """
    if config.no_decay == "vectors":
        return decay_mask
    if config.no_decay == "positions":
        return lambda params: {name: name.rpartition(".")[2] != "pos_embed" for name in params}
    if config.no_decay == "nothing":
        return lambda params: dict.fromkeys(params, True)
    try:
        official = {row.ours: row.official for row in table(model)}
    except UserError as error:
        raise UserError(f"config.optim.no_decay='norm_names' goes by official names, but {error}") from error
    return lambda params: {name: "norm" not in official.get(name, name) for name in params}


def learning_rate(config: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Return the schedule: a linear warm-up, then what ``config.schedule`` names.

    - "cosine" goes from ``lr`` to ``min_lr``. Where ``warmup_prefix`` is off it begins with the run, and what the
      warm-up lasts of it is not seen.
    - "poly" goes there along a line, which begins after the warm-up and whose last step has ``min_lr``. Where
      ``warmup_prefix`` is off it begins with the run and ends one step after it, and the warm-up scales it.
    - "milestones" multiplies the rate by 0.1 after so many epochs each, during a warm-up too.

    The warm-up of a cosine, and one that scales, ends with the step after it; the others have reached ``lr`` with their
    own last step. After cosine and poly follows the cool-down at ``min_lr``.

    By ``lr_changes``, the rate follows the formula with every step, or stands still within an epoch: in the warm-up at
    the value for the epoch's first step, or always at the value for the first step of the epoch before.

    Raises:
        UserError: a warm-up that leaves no steps for the rest.

    Source: Swin's trainer (VMamba, MSVMamba), the released logs of EfficientVMamba, and timm's CosineLRScheduler as the
    trainers of Vim and MambaVision call it; mmengine 0.10.7 ``LinearLR`` before ``PolyLR`` or ``MultiStepLR``, and, of
    poly without prefix, mmcv 1's ``PolyLrUpdaterHook`` with ``warmup="linear"``.
    """
    warmup, cooldown = (length.in_steps(steps_per_epoch) for length in (config.warmup, config.cooldown))
    last = total_steps - cooldown
    if warmup >= last:
        raise UserError(
            f"config.optim.warmup lasts {warmup} steps and the whole run {total_steps}"
            + (f", of which {cooldown} are its cool-down" if cooldown else "")
            + ": shorten the warm-up"
        )
    formula = _FORMULAS[config.schedule](config, warmup, last, steps_per_epoch)

    def schedule(step):
        epoch = step // steps_per_epoch * steps_per_epoch
        if config.lr_changes == "epoch":
            step = jnp.maximum(epoch - steps_per_epoch, 0)
        elif config.lr_changes == "warmup_epoch":
            step = jnp.where(step < warmup, epoch, step)
        return formula(step)

    return schedule


def _cosine(config: OptimConfig, warmup: int, last: int, steps_per_epoch: int) -> optax.Schedule:
    start = warmup if config.warmup_prefix else 0
    linear = optax.linear_schedule(config.warmup_lr, config.lr, warmup)
    cosine = optax.cosine_decay_schedule(config.lr, last - start, alpha=config.min_lr / config.lr)

    def schedule(step):
        return jnp.where(step < warmup, linear(step), cosine(step - start))

    return schedule


def _line(first: float, last: float, steps: int) -> optax.Schedule:
    """Return a line from ``first`` to ``last``, which it has after so many steps; precise near an end that is 0."""
    steps = max(steps, 1)

    def schedule(step):
        done = jnp.clip(step, 0, steps)
        return first * ((steps - done) / steps) + last * (done / steps)

    return schedule


def _poly(config: OptimConfig, warmup: int, last: int, steps_per_epoch: int) -> optax.Schedule:
    linear, line = _line(config.warmup_lr, config.lr, warmup - 1), _line(config.lr, config.min_lr, last - warmup - 1)

    def schedule(step):
        return jnp.where(step < warmup, linear(step), line(step - warmup))

    scale, whole = _line(config.warmup_lr / config.lr, 1.0, warmup), _line(config.lr, config.min_lr, last)

    def scaled(step):
        return jnp.where(step < warmup, scale(step), 1.0) * whole(step)

    return schedule if config.warmup_prefix else scaled


def _milestones(config: OptimConfig, warmup: int, last: int, steps_per_epoch: int) -> optax.Schedule:
    linear = _line(config.warmup_lr, config.lr, warmup - 1)
    drops = np.asarray([round(epochs * steps_per_epoch) for epochs in config.milestones])

    def schedule(step):
        return jnp.where(step < warmup, linear(step), config.lr) * _DROP ** jnp.sum(step >= drops)

    return schedule


_FORMULAS = {"cosine": _cosine, "poly": _poly, "milestones": _milestones}


def make_optimizer(
    config: OptimConfig,
    schedule: optax.Schedule,
    scales: Mapping[str, float] | None = None,
    *,
    decayed: Mask = decay_mask,
) -> optax.GradientTransformation:
    """Return the optimizer, behind global-norm clipping.

    LAMB's trust ratio scales the parameters that weight decay touches; the others move as Adam moves them.

    Args:
        config: name, moments, decay and clipping.
        schedule: the learning rate by step.
        scales: factors of the learning rate by path; None for 1 everywhere.
        decayed: which parameters weight decay touches, as :func:`decayed_by` gives it.

    Source: torch.optim.AdamW; timm.optim.Lamb with its default ``max_grad_norm`` of 1 and ``always_adapt=False``.
    """
    adam = optax.scale_by_adam(*config.betas, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, decayed) if config.weight_decay else optax.identity()
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "lamb":
        adapt = optax.masked(optax.scale_by_trust_ratio(), decayed) if config.weight_decay else optax.identity()
        parts += [optax.clip_by_global_norm(1.0), adam, decay, adapt]
    else:
        parts += [adam, decay]
    parts.append(optax.scale_by_learning_rate(schedule))
    if scales is not None:
        # Last, so that the states of the parts before it keep their places whether or not there are scales.
        parts.append(optax.stateless(lambda updates, _: _scaled(updates, scales)))
    return optax.chain(*parts)


def _scaled(updates: Any, scales: Mapping[str, float]) -> Any:
    return {name: scales[name] * update for name, update in updates.items()}
