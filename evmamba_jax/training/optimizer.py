"""AdamW with the official decay mask and schedule."""

import jax.numpy as jnp
import optax

from evmamba_jax.errors import UserError
from evmamba_jax.training.config import OptimConfig

# The official trainers spare 1-D tensors and names ending in ".bias". That leaves A_log and the stacked dt biases
# decayed although their code marks them otherwise; D is 1-D there and a matrix here. Vim also spares its position
# embedding and class token.
_NOT_DECAYED = ("bias", "scale", "D", "gamma_1", "gamma_2", "pos_embed", "cls_token")


def decay_mask(params: dict) -> dict[str, bool]:
    """Return for every parameter path whether weight decay touches it."""

    def decayed(name: str) -> bool:
        leaf = name.rsplit(".", 1)[-1]
        # The dt bias of a scan with a single set of parameters is 1-D in the official code, and a matrix here.
        return leaf not in _NOT_DECAYED and not (leaf == "dt_bias" and params[name].shape[0] == 1)

    return {name: decayed(name) for name in params}


def learning_rate(config: OptimConfig, *, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Return the schedule: linear warm-up, then cosine from ``lr`` to ``min_lr`` over the steps that are left.

    Source: the released EfficientVMamba logs with ``warmup_by_epoch``, where epoch k < w runs at
    ``warmup_lr + (lr - warmup_lr) k / w``; the Swin-style trainer of the README without.
    """
    warmup_steps = config.warmup.in_steps(steps_per_epoch)
    if warmup_steps >= total_steps:
        raise UserError(
            f"config.optim.warmup lasts {warmup_steps} steps and the whole run {total_steps}: shorten the warm-up"
        )
    cosine = optax.cosine_decay_schedule(config.lr, total_steps - warmup_steps, alpha=config.min_lr / config.lr)
    if not warmup_steps:
        return cosine
    linear = optax.linear_schedule(config.warmup_lr, config.lr, warmup_steps)

    def warmup(step):
        if config.warmup_by_epoch:
            step = jnp.floor(step / steps_per_epoch) * steps_per_epoch
        return linear(step)

    return optax.join_schedules([warmup, cosine], [warmup_steps])


def adamw(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return global-norm clipping followed by AdamW."""
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.adamw(schedule, *config.betas, eps=config.eps, weight_decay=config.weight_decay, mask=decay_mask),
    )
