"""AdamW and LAMB with the official decay masks, and the official schedules."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from evmamba_jax.config import OptimConfig
from evmamba_jax.errors import UserError

# The official trainers spare 1-D tensors and names ending in ".bias". That leaves A_log and the stacked dt biases
# decayed although their code marks them otherwise; D is 1-D there and a matrix here. Vim also spares its position
# embedding and class token; S4 and S5 spare what their systems and time steps are made of.
_NOT_DECAYED = (
    *("bias", "scale", "D", "gamma", "gamma_1", "gamma_2", "pos_embed", "cls_token", "score", "query"),
    *("log_dt", "log_A_real", "A_imag", "Lambda_re", "Lambda_im", "log_step"),
)


def decay_mask(params: dict) -> dict[str, bool]:
    """Return for every parameter path whether weight decay touches it."""

    def decayed(name: str) -> bool:
        leaf = name.rsplit(".", 1)[-1].removeprefix("backward_")
        # The dt bias of a scan with a single set of parameters is 1-D in the official code, and a matrix here.
        return leaf not in _NOT_DECAYED and not (leaf == "dt_bias" and params[name].shape[0] == 1)

    return {name: decayed(name) for name in params}


def learning_rate(config: OptimConfig, *, total_steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Return the schedule: linear warm-up, cosine from ``lr`` to ``min_lr``, and then ``min_lr``.

    Where ``warmup_prefix`` is off the cosine begins with the run, and what the warm-up lasts of it is not seen. By
    ``lr_changes``, the rate follows the formula with every step, or stands still within an epoch: in the warm-up at the
    value for the epoch's first step, or always at the value for the first step of the epoch before.

    Raises:
        UserError: a warm-up that leaves no steps for the cosine.

    Source: Swin's trainer (VMamba, MSVMamba), the released logs of EfficientVMamba, and timm's CosineLRScheduler as the
    trainers of Vim and MambaVision call it.
    """
    warmup, cooldown = (length.in_steps(steps_per_epoch) for length in (config.warmup, config.cooldown))
    last = total_steps - cooldown
    if warmup >= last:
        raise UserError(
            f"config.optim.warmup lasts {warmup} steps and the whole run {total_steps}"
            + (f", of which {cooldown} are its cool-down" if cooldown else "")
            + ": shorten the warm-up"
        )
    start = warmup if config.warmup_prefix else 0
    linear = optax.linear_schedule(config.warmup_lr, config.lr, warmup)
    cosine = optax.cosine_decay_schedule(config.lr, last - start, alpha=config.min_lr / config.lr)

    def schedule(step):
        epoch = step // steps_per_epoch * steps_per_epoch
        if config.lr_changes == "epoch":
            step = jnp.maximum(epoch - steps_per_epoch, 0)
        elif config.lr_changes == "warmup_epoch":
            step = jnp.where(step < warmup, epoch, step)
        return jnp.where(step < warmup, linear(step), cosine(step - start))

    return schedule


def make_optimizer(
    config: OptimConfig, schedule: optax.Schedule, scales: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Return the optimizer, behind global-norm clipping.

    LAMB's trust ratio scales the parameters that weight decay touches; the others move as Adam moves them.

    Args:
        config: name, moments, decay and clipping.
        schedule: the learning rate by step.
        scales: factors of the learning rate by path; None for 1 everywhere.

    Source: torch.optim.AdamW; timm.optim.Lamb with its default ``max_grad_norm`` of 1 and ``always_adapt=False``.
    """
    adam = optax.scale_by_adam(*config.betas, eps=config.eps)
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask) if config.weight_decay else optax.identity()
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "lamb":
        adapt = optax.masked(optax.scale_by_trust_ratio(), decay_mask) if config.weight_decay else optax.identity()
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
