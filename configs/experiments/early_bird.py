"""Experiment 5: channels pruned at once, as soon as the masks of successive epochs no longer move.

The course claimed tickets within 6 epochs; its code can report none, and measured nothing. Here the inner channels of
Vim's mixers, --config.pruning.final=0.3, 0.5 or 0.7, in the one recipe of all rows: 100 epochs: 19,500 steps of 256
images, 4,992,000 in all. Without a network: early_bird:digits, :fashion. The course's model has no channels to cut.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config, Duration, PruningConfig


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    config = recipe(variant)
    epochs = config.duration.epochs
    config.pruning = PruningConfig(
        method="early_bird", structure="channels", final=0.5, every=Duration(epochs=min(1, 0.05 * epochs))
    )
    return config
