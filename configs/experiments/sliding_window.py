"""Experiment 7: sliding-window attention in place of MambaVision's windows, radius 2.

The course claimed a larger field at high resolution; it has no code and no figure. Here in the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: sliding_window:fashion, :digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    return recipe(variant, vision=True, options={"mambavision": {"attention_radius": 2}})
