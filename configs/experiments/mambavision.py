"""Experiments 7 to 10, the row beside which they stand: MambaVision as it is.

The course measured 5.29, 7.63 and 9.42 % on CIFAR-100 after its first three epochs, and no more. Here in the one
recipe of all rows: 100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network:
mambavision:fashion, :digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    return recipe(variant, vision=True)
