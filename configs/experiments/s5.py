"""Experiment 8: S5 in place of the selective scan in MambaVision's mixers, both directions.

The course claimed "promise"; it has no code and no figure. Here in the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: s5:fashion, :digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    return recipe(variant, vision=True, options={"mambavision": {"ssm": "s5", "ssm_bidirectional": True}})
