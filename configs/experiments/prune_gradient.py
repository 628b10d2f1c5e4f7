"""Experiment 6: weights pruned by their gradients, all ranked together; --config.pruning.score=taylor or movement.

The course claimed pruning by gradients; its code adds gradients up and prunes nothing, and measured nothing. Here along
half a cosine as in prune_cosine, in the one recipe of all rows: 100 epochs: 19,500 steps of 256 images, 4,992,000 in
all. Without a network: prune_gradient:digits, :course_digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config, Duration, PruningConfig


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    config = recipe(variant)
    epochs = config.duration.epochs
    config.pruning = PruningConfig(
        method="gradual",
        score="gradient",
        scope="global",
        final=0.6,
        begin=Duration(epochs=0.1 * epochs),
        end=Duration(epochs=0.7 * epochs),
        every=Duration(epochs=0.05 * epochs),
    )
    return config
