"""Experiment 10: ConvNeXt's block, stem and downsampling in MambaVision.

The course has a text file with a command, and no figure. Here in the one recipe of all rows:
100 epochs: 19,500 steps of 256 images, 4,992,000 in all. Without a network: convnext:fashion, :digits.
"""

from evmamba_jax.recipes.experiments import recipe
from evmamba_jax.training.config import Config


def get_config(variant: str = "") -> Config:
    """Return the configuration of a variant, which ``evmamba_jax.recipes.experiments`` explains."""
    return recipe(
        variant,
        vision=True,
        options={"mambavision": {"conv_block": "convnext", "stem": "patchify", "downsample": "convnext"}},
    )
