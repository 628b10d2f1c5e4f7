"""Experiments, the row beside which all others stand: nothing varied; Vim, or baseline:course.

The course claimed: no baseline of its own for experiments 1 to 3. Here, with the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: baseline:digits, baseline:course_digits,
baseline:fashion.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    return recipe(variant)
