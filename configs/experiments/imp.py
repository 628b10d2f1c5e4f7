"""Experiment 4: lottery tickets by iterative magnitude pruning, with rewinding and a random control.

The course claimed tickets of a tenth of the weights; its code prunes once, fine-tunes, and measured nothing. Here a
fifth of the weights left goes at each of 10 levels, all arrays ranked together; each level starts again from the dense
run's state after 2 % of it, and beside it runs one with as many weights chosen by chance. Every level has the one
recipe of all rows: 100 epochs: 19,500 steps of 256 images, 4,992,000 in all; 21 runs. Without a network: imp:digits,
imp:course_digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config, Duration, PruningConfig


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    config = recipe(variant)
    config.pruning = PruningConfig(
        method="imp", scope="global", rewind=Duration(epochs=0.02 * config.duration.epochs), controls=("random",)
    )
    return config
