"""Experiment 1: a squeeze-and-excitation gate over tokens on each mixer's output; Vim, or squeeze_excite:course.

The course claimed "variable results" and measured 61.01 % on CIFAR-10 (one run, constant rate, no augmentation:
squeeze_excite:notebook), with no baseline of these settings. Here reduction 4 in the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: squeeze_excite:digits, :course_digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    gate = {"squeeze_excite": 4}
    return recipe(variant, options={"vim": gate, "course": gate})
